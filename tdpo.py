"""Token-level Direct Preference Optimization (Zeng et al., ICML 2024, arXiv:2404.11999): the losses and the sequential KL.

Paste this file into any trainer; it needs torch alone. From the top: `token_stats` is what one token contributes, `margin` and
`preference_loss` are the paper's equations, `tdpo_loss` is the loss on ordinary logits, and `fused_tdpo_loss` gives its numbers on
hidden states, without ever holding a batch's logits. All in nats, all sums (never means) over response tokens only.
"""
import torch
import torch.nn.functional as F

METHODS = ("dpo", "fdpo", "tdpo1", "tdpo2")
STATS = ("loss", "logratio_w", "logratio_l", "kl_w", "kl_l", "rkl_w", "rkl_l")
CHUNK_ROWS = 4096       # fused form: response tokens whose logits live at once (an eighth on a CPU); fewer re-read the weight too often
COMPILE_VOCAB = 8192    # fused form: from this vocabulary on, compiling the elementwise part pays for itself
_compiled = {}          # elementwise function -> its compiled form, or the function itself where compiling failed


def token_stats(pi_logits, ref_logits, labels):
    """What each token adds to the sums: its log-ratio and the two KL divergences of the next-token distributions.

    pi_logits, ref_logits: (..., V), any float dtype, already aligned: the logits that predict labels (...).
    Returns logratio, kl, reverse_kl, each (...) fp32 in nats; a label of -100 gives zeros. No gradient reaches ref_logits.
    kl = KL(ref || pi), the forward KL of Eq. 10; reverse_kl = KL(pi || ref), which the paper's Figures 1 and 3 plot.
    Vocabulary entries masked with -inf in both logits add nothing.
    """
    return _token_stats(pi_logits, ref_logits, labels)[:3]


def _token_stats(pi_logits, ref_logits, labels):       # and both log-normalizers (..., 1), which the fused gradient needs again
    wide = torch.promote_types(pi_logits.dtype, torch.float32)
    z, ref_z, target = pi_logits.to(wide), ref_logits.detach().to(wide), labels.clamp(min=0).unsqueeze(-1)
    lse, ref_lse = z.logsumexp(-1, keepdim=True), ref_z.logsumexp(-1, keepdim=True)
    logratio = ((z.gather(-1, target) - lse) - (ref_z.gather(-1, target) - ref_lse)).squeeze(-1)        # 0 where the models agree
    logp, logq = z - lse, ref_z - ref_lse                       # never softmax().log(): 0 * -inf = NaN at gaps >= 104
    kl = _kl(logq, logp)                                                                                   # Eq. 10
    reverse_kl = _kl(logp.detach(), logq)
    response = labels != -100
    return *(torch.where(response, x, 0) for x in (logratio, kl, reverse_kl)), lse, ref_lse


def _kl(logq, logp):
    """KL(q || p) over the last axis as sum q (e^d - 1 - d), d = log p - log q, which is sum q log q / p as p and q both sum to 1:
    no term is negative, so the first-order terms, far larger than a small KL, do not have to cancel in fp32."""
    p, q, d = logp.exp(), logq.exp(), logp - logq
    small = d.abs() < 1
    x = torch.where(small, d, 0)        # keeps expm1, and its gradient, finite
    return torch.where(small, q * (x.expm1() - x), p - q - torch.where(q > 0, q * d, 0)).sum(-1)


def margin(method, logratio_w, logratio_l, kl_w, kl_l, beta=0.1, alpha=0.5):
    """beta * v (P,), the argument of the sigmoid. logratio_*, kl_*: (P,) sums over the chosen (w) and rejected (l) responses.
    Raises ValueError for a method that is not one of METHODS."""
    if method == "dpo":
        v = logratio_w - logratio_l                                            # Rafailov et al. 2023, Eq. 7
    elif method == "fdpo":      # f-DPO with forward KL, the FKL row of Table 1 (Wang et al. 2024); e^80 is safe in fp32
        v = (-logratio_l).clamp(max=80).exp() - (-logratio_w).clamp(max=80).exp()
    elif method == "tdpo1":
        v = logratio_w - logratio_l - (kl_l - kl_w)                            # Eq. 15
    elif method == "tdpo2":
        v = logratio_w - logratio_l - alpha * (kl_l - kl_w.detach())           # Eq. 17 and 18: sg[.] is detach
    else:
        raise ValueError(f"unknown method {method!r}; it is one of {', '.join(METHODS)}")
    return beta * v


def preference_loss(method, logratio_w, logratio_l, kl_w, kl_l, beta=0.1, alpha=0.5):
    """-log sigmoid(beta v), one loss a pair (P,). Arguments and errors as in `margin`; alpha acts in tdpo2 alone."""
    return -F.logsigmoid(margin(method, logratio_w, logratio_l, kl_w, kl_l, beta, alpha))


def tdpo_loss(pi_logits, ref_logits, labels, yw_idx, yl_idx, beta=0.1, alpha=0.5, method="tdpo2"):
    """The paper's Appendix B, mended: masked, shifted, summed over tokens before the sigmoid.

    pi_logits, ref_logits: (B, T, V). labels: (B, T), unshifted (labels[b, t] is the input token t), -100 outside the responses.
    yw_idx, yl_idx: (P,) rows of the chosen and of the rejected responses. Returns losses (P,) and stats, a dict of detached
    (P,) tensors named in STATS. Peak memory is several fp32 N x V tensors; `fused_tdpo_loss` needs none.
    """
    labels, pi_logits, ref_logits = labels[:, 1:], pi_logits[:, :-1], ref_logits[:, :-1]    # position t predicts token t + 1
    response = labels != -100           # select before reducing: NaN * 0 = NaN, so a mask cannot remove a bad prompt row
    tokens = torch.stack(token_stats(pi_logits[response], ref_logits[response], labels[response]))                # (3, N)
    sums = tokens.new_zeros(3, len(labels)).index_add(1, response.nonzero()[:, 0], tokens)                            # (3, B)
    (logratio_w, kl_w, rkl_w), (logratio_l, kl_l, rkl_l) = sums[:, yw_idx], sums[:, yl_idx]
    losses = preference_loss(method, logratio_w, logratio_l, kl_w, kl_l, beta, alpha)
    stats = (losses, logratio_w, logratio_l, kl_w, kl_l, rkl_w, rkl_l)
    return losses, {name: x.detach() for name, x in zip(STATS, stats)}


# Below: the same loss in one pass over the vocabulary. A token enters the loss only through its pair's two sums, so a chunk of
# whole pairs knows its gradient as soon as those are summed: two products forward, two backward, nothing kept or recomputed.


def fused_tdpo_loss(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen, beta=0.1, alpha=0.5, method="tdpo2"):
    """`tdpo_loss(...)[0].mean()` without N x V logits: they live for CHUNK_ROWS tokens (or one longer pair) at a time.

    hidden, ref_hidden: (N, d), the states that predict labels (N,). weight, ref_weight: (V, d), the two output layers; a bias
    is one more column of weight beside a column of ones in hidden. pair: (N,) int, ascending from 0 to P - 1. chosen: (N,)
    bool; both best on the CPU, or the device is waited for. Returns the loss (scalar, the mean over pairs) and stats as in `tdpo_loss`.
    The gradient, to hidden and weight, is taken in forward: a second derivative is a RuntimeError, a GradScaler's factor too late. Under
    autocast the products take its dtype (on a CPU the backward ones); logits, sums are fp32. ValueError: unknown method, lengths, order of pairs.
    """
    loss, *stats = _fused(hidden, weight, ref_hidden, ref_weight, labels, pair.cpu(), chosen.cpu(), beta, alpha, method)
    return loss, dict(zip(STATS, stats))


def fused_sft_loss(hidden, weight, labels):
    """Cross-entropy by the same road: its mean over the N tokens, and stats {"loss": (N,)}. Arguments and errors as above."""
    loss, losses, *_ = _fused(hidden, weight, None, None, labels, token := torch.arange(len(labels)), token >= 0, 0, 0, None)
    return loss, {"loss": losses}


@torch.compiler.disable         # torch.compile works around it; what gains by compilation in here is compiled below
def _fused(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen, beta, alpha, method):
    if not len(hidden) == len(labels) == len(pair) == len(chosen) == len(hidden if ref_hidden is None else ref_hidden) > 0:
        raise ValueError("hidden, ref_hidden, labels, pair and chosen need one entry for each of N > 0 response tokens")
    if pair[0] != 0 or ((steps := pair.diff()) < 0).any() or (steps > 1).any():
        raise ValueError("pair must ascend from 0 to P - 1 without gaps; sort the tokens by pair first")
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _Fused.apply(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen, beta, alpha, method)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, labels, pair, chosen, beta, alpha, method):
        device, pairs, sft = hidden.device.type, int(pair[-1]) + 1, ref_hidden is None
        budget = CHUNK_ROWS if device == "cuda" else -(-CHUNK_ROWS // 8)
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wide = torch.promote_types(low, torch.float32)
        dtype = low if device == "cuda" else wide       # of what makes logits: rounded to bf16, they would turn a KL of 3e-4 into 3e-3.
        precision = "bf16" if device == "cpu" and low != wide else None     # a CPU's fp32 products may round operands, not results
        d_hidden, d_weight = torch.zeros_like(hidden), None
        with torch.autocast(device, enabled=False), torch.backends.mkldnn.flags(None, None, None, precision):
            w, ref_w = weight.to(dtype), None if sft else ref_weight.to(dtype)
            w_low = w.to(low)
            ends = torch.bincount(pair).cumsum(0)
            slots = (2 * pair + chosen).int().to(hidden.device, non_blocking=device == "cuda")      # two sums a pair: rejected, chosen
            stats, first, begin = [], 0, 0
            while first < pairs:                                                    # pairs first..last - 1 make a chunk
                last = max(first + 1, int(torch.searchsorted(ends, begin + budget, right=True)))
                rows, p = slice(begin, int(ends[last - 1])), last - first
                h, y, slot = hidden[rows], labels[rows], slots[rows] - 2 * first
                z, ref_z = _product(h.to(dtype), w.T, wide), None if sft else _product(ref_hidden[rows].to(dtype), ref_w.T, wide)
                *tokens, lse, ref_lse = _elementwise(_sft_stats, z, y) if sft else _elementwise(_token_stats, z, ref_z, y)
                sums = tokens[0].new_zeros(3, 2 * p).index_add_(1, slot, torch.stack(tokens)).view(3, p, 2)
                with torch.set_grad_enabled(any(ctx.needs_input_grad)):     # the loss stays where it is written: preference_loss
                    x = sums[:2].detach().requires_grad_(any(ctx.needs_input_grad))
                    losses = -x[0, :, 1] if sft else preference_loss(method, x[0, :, 1], x[0, :, 0], x[1, :, 1], x[1, :, 0], beta, alpha)
                stats.append(torch.cat([losses.detach()[None], sums.flip(-1).transpose(1, 2).reshape(6, p)]))
                if any(ctx.needs_input_grad):
                    (g,) = torch.autograd.grad(losses, x, torch.full_like(losses, 1 / pairs))
                    g_logp, g_kl = g.view(2, 2 * p)[:, slot] * (y != -100)
                    dz = _elementwise(_dlogits, z, None if method in ("dpo", "fdpo") else ref_z, y, lse, ref_lse, g_logp, g_kl, low)
                    del z, ref_z                         # room for the products
                    d_hidden[rows] = dz @ w_low
                    if ctx.needs_input_grad[1]:          # chunks add up in fp32: a sum rounded to bf16 at every chunk biases training
                        share = _product(dz.T, h.to(low), wide)
                        d_weight, share = share.to(wide) if d_weight is None else d_weight.add_(share), None
                    del dz
                first, begin = last, rows.stop
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(*(out := torch.cat(stats, 1).unbind()))
        return (out[0].mean(), *out)

    @staticmethod
    def backward(ctx, grad, *_):
        if torch.is_grad_enabled():     # create_graph=True
            raise RuntimeError("the fused losses take their gradient in forward: for a second derivative use tdpo_loss")
        return *(None if x is None else x * grad for x in ctx.saved_tensors), *[None] * 8


def _product(a, b, wide):       # a @ b, accumulated in fp32; bf16 operands give fp32 on CUDA alone
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda and a.dtype != wide else a @ b


def _sft_stats(z, labels):      # _token_stats without a reference: log p(label), no divergences, the log-normalizer
    lse = z.logsumexp(-1, keepdim=True)
    logp = torch.where(labels != -100, (z.gather(-1, labels.clamp(min=0)[:, None]) - lse)[:, 0], 0)
    return logp, torch.zeros_like(logp), torch.zeros_like(logp), lse, None


def _dlogits(z, ref_z, labels, lse, ref_lse, g_logp, g_kl, dtype):
    """d loss / d z = g_logp (onehot - p) + g_kl (p - q), (n, V); g_logp, g_kl (n,) are d loss / d of the token's two sums."""
    p = (z - lse).exp()
    onehot = torch.arange(z.shape[-1], device=z.device) == labels[:, None]
    dz = g_logp[:, None] * (onehot.to(p.dtype) - p)
    return (dz if ref_z is None else dz + g_kl[:, None] * (p - (ref_z - ref_lse).exp())).to(dtype)


def _elementwise(fn, z, *rest):
    """fn(z, *rest), compiled for a large vocabulary: one sweep over the logits instead of a dozen temporaries of their size."""
    if z.shape[-1] >= COMPILE_VOCAB and _compiled.get(fn) is not fn:
        try:
            _compiled[fn] = _compiled.get(fn) or torch.compile(fn, dynamic=True)
            return _compiled[fn](z, *rest)
        except Exception as error:      # torch has no one exception for "no C++ compiler" or "no Triton"
            result = fn(z, *rest)       # memory that is short and arguments that are wrong fail here too
            print(f"torch.compile failed on {fn.__name__}, so it runs uncompiled (slower): {error}".split("\n")[0])
            _compiled[fn] = fn
            return result
    return fn(z, *rest)
