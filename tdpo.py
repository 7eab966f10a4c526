"""Token-level Direct Preference Optimization (Zeng et al., ICML 2024, arXiv:2404.11999): the losses and the sequential KL.

Paste this file into any trainer; it needs torch and nothing else. Read it from the top: `token_stats` is what one token
contributes, `margin` and `preference_loss` are the paper's equations, `tdpo_loss` is the whole loss on ordinary logits,
and `fused_tdpo_loss` gives the same numbers from hidden states, without ever holding the logits of a whole batch.
Everything is in nats, and every sum runs over response tokens only: sums, never means.
"""
import torch
import torch.nn.functional as F

METHODS = ("dpo", "fdpo", "tdpo1", "tdpo2")
STATS = ("loss", "logratio_w", "logratio_l", "kl_w", "kl_l", "rkl_w", "rkl_l")
CHUNK_ROWS = 2048       # fused form: response tokens whose logits live at once; 2k-8k keeps the products efficient
COMPILE_VOCAB = 8192    # fused form: from this vocabulary on, compiling the elementwise part pays for itself


def token_stats(pi_logits, ref_logits, labels):
    """What each token adds to the sums: its log-ratio and the two KL divergences of the next-token distributions.

    pi_logits, ref_logits: (..., V), any float dtype, already aligned: the logits that predict labels (...).
    Returns logratio, kl, reverse_kl, each (...) fp32 in nats; a label of -100 gives zeros. No gradient reaches ref_logits.
    kl = KL(ref || pi), the forward KL of Eq. 10; reverse_kl = KL(pi || ref), which the paper's Figures 1 and 3 plot.
    Vocabulary entries masked with -inf in both logits add nothing.
    """
    wide = torch.promote_types(pi_logits.dtype, torch.float32)
    logp = pi_logits.to(wide).log_softmax(-1)                  # never softmax().log(): 0 * -inf = NaN at gaps >= 104
    logq = ref_logits.detach().to(wide).log_softmax(-1)
    target = labels.clamp(min=0).unsqueeze(-1)
    logratio = (logp.gather(-1, target) - logq.gather(-1, target)).squeeze(-1)
    kl = _kl(logq, logp)                                                                                   # Eq. 10
    reverse_kl = _kl(logp.detach(), logq)
    response = labels != -100
    return tuple(torch.where(response, x, 0) for x in (logratio, kl, reverse_kl))


def _kl(logq, logp):
    """KL(q || p) over the last axis as sum q (e^d - 1 - d), d = log p - log q, which is sum q log q / p as p and q both sum to 1.

    No term is negative, so the first-order terms, far larger than a small KL, do not have to cancel in fp32.
    """
    p, q, d = logp.exp(), logq.exp(), logp - logq
    small = d.abs() < 1
    x = torch.where(small, d, 0)        # keeps expm1, and its gradient, finite
    return torch.where(small, q * (x.expm1() - x), p - q - torch.where(q > 0, q * d, 0)).sum(-1)


def margin(method, logratio_w, logratio_l, kl_w, kl_l, beta=0.1, alpha=0.5):
    """beta * v (P,), the argument of the sigmoid. logratio_*, kl_*: (P,) sums over the chosen (w) and rejected (l) responses.

    Raises ValueError for a method that is not one of METHODS.
    """
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


# ---------------------------------------------------------------------------------------------------------------------
# The same loss in one pass over the vocabulary. A token enters the loss only through its pair's two sums, so a chunk of
# whole pairs knows its gradient as soon as those are summed: two products forward, two backward, nothing kept or recomputed.


def fused_tdpo_loss(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen, beta=0.1, alpha=0.5, method="tdpo2"):
    """`tdpo_loss(...)[0].mean()` without N x V logits: they live for CHUNK_ROWS tokens (or one longer pair) at a time.

    hidden, ref_hidden: (N, d), the states that predict labels (N,). weight, ref_weight: (V, d), the two output layers; a bias
    is one more column of weight beside a column of ones in hidden. pair: (N,) int, ascending from 0 to P - 1. chosen: (N,)
    bool. Returns the loss (scalar, the mean over pairs) and stats as in `tdpo_loss`. pair and chosen may stay on the CPU,
    which saves a wait for the device. The gradient, to hidden and weight alone, is taken in forward (backward only scales it),
    so a second derivative is a RuntimeError. Under autocast the products take its dtype; logits and sums are fp32.
    Raises ValueError for an unknown method, lengths that differ, or pairs out of order.
    """
    loss, *stats = _fused(hidden, weight, ref_hidden, ref_weight, labels, pair.cpu(), chosen.cpu(), beta, alpha, method)
    return loss, dict(zip(STATS, stats))


@torch.compiler.disable         # torch.compile works around it; what gains by compilation in here is compiled below
def _fused(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen, beta, alpha, method):
    if not len(hidden) == len(ref_hidden) == len(labels) == len(pair) == len(chosen) > 0:
        raise ValueError("hidden, ref_hidden, labels, pair and chosen need one entry for each of N > 0 response tokens")
    if pair[0] != 0 or not ((steps := pair.diff()) >= 0).all() or not (steps <= 1).all():
        raise ValueError("pair must ascend from 0 to P - 1 without gaps; sort the tokens by pair first")
    train = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _Fused.apply(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen, beta, alpha, method, train)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, labels, pair, chosen, beta, alpha, method, train):
        device, pairs = hidden.device.type, int(pair[-1]) + 1
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if device != "cuda":    # elsewhere bf16 products round their result to bf16, and with it a KL of 3e-4 to 3e-3
            dtype = torch.promote_types(dtype, torch.float32)
        wide = torch.promote_types(dtype, torch.float32)
        d_hidden = torch.zeros_like(hidden) if train and ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if train and ctx.needs_input_grad[1] else None
        stats = torch.empty(len(STATS), pairs, dtype=wide, device=hidden.device)
        with torch.autocast(device, enabled=False):
            w, ref_w = weight.to(dtype), ref_weight.to(dtype)
            ends = torch.bincount(pair).cumsum(0).tolist()
            slots = (2 * pair + chosen).to(hidden.device, non_blocking=True)     # two sums a pair: rejected, chosen
            first = begin = 0
            while first < pairs:
                last = first                                                        # pairs first..last make a chunk
                while last + 1 < pairs and ends[last + 1] - begin <= CHUNK_ROWS:
                    last += 1
                rows, p = slice(begin, ends[last]), last + 1 - first
                h, y, slot = hidden[rows].to(dtype), labels[rows], slots[rows] - 2 * first
                z, ref_z = _product(h, w.T, wide), _product(ref_hidden[rows].to(dtype), ref_w.T, wide)
                tokens = torch.stack(_elementwise(token_stats, z, ref_z, y))
                sums = tokens.new_zeros(3, 2 * p).index_add_(1, slot, tokens).view(3, p, 2)
                with torch.enable_grad():                # the loss stays where it is written: preference_loss
                    x = sums[:2].detach().requires_grad_()
                    losses = preference_loss(method, x[0, :, 1], x[0, :, 0], x[1, :, 1], x[1, :, 0], beta, alpha)
                    (g,) = torch.autograd.grad(losses.sum() / pairs, x)
                stats[0, first:last + 1] = losses.detach()
                stats[1:, first:last + 1] = sums.flip(-1).transpose(1, 2).reshape(6, p)
                if train:
                    g_logp, g_kl = g.view(2, 2 * p)[:, slot] * (y != -100)
                    dz = _elementwise(_dlogits, z, ref_z, y, g_logp, g_kl).to(dtype)
                    if d_hidden is not None:
                        d_hidden[rows] = dz @ w
                    if d_weight is not None:             # fp32: rounding every chunk's share to bf16 biases training
                        d_weight += _product(dz.T, h, wide)
                first, begin = last + 1, ends[last]
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(*(out := stats.unbind()))
        return (stats[0].mean(), *out)

    @staticmethod
    def backward(ctx, grad, *_):
        if torch.is_grad_enabled():     # create_graph=True
            raise RuntimeError("fused_tdpo_loss takes its gradient in forward: for a second derivative use tdpo_loss")
        return *(None if x is None else x * grad for x in ctx.saved_tensors), *[None] * 9


def _product(a, b, wide):
    """a @ b, accumulated and returned in fp32 (fp64 for fp64 operands)."""
    return a @ b if a.dtype == wide else torch.mm(a, b, out_dtype=wide)


def _dlogits(z, ref_z, labels, g_logp, g_kl):
    """d loss / d z = g_logp (onehot - p) + g_kl (p - q), (n, V); g_logp, g_kl (n,) are d loss / d of the token's two sums."""
    p, q = z.softmax(-1), ref_z.softmax(-1)
    onehot = torch.arange(z.shape[-1], device=z.device) == labels[:, None]
    return g_logp[:, None] * (onehot.to(p.dtype) - p) + g_kl[:, None] * (p - q)


_compiled = {}      # function -> its compiled form, or the function itself where compiling failed


def _elementwise(fn, z, *rest):
    """fn(z, *rest), compiled for a large vocabulary: one sweep over the logits instead of a dozen temporaries of their size."""
    if z.shape[-1] < COMPILE_VOCAB or _compiled.get(fn) is fn:
        return fn(z, *rest)
    try:
        if fn not in _compiled:
            _compiled[fn] = torch.compile(fn, dynamic=True)
        return _compiled[fn](z, *rest)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:          # torch has no one exception for "no C++ compiler" or "no Triton"
        print(f"torch.compile failed on {fn.__name__}, so it runs uncompiled (slower): {error}".split("\n")[0])
        _compiled[fn] = fn
        return fn(z, *rest)
