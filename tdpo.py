"""Token-level Direct Preference Optimization (Zeng et al., ICML 2024, arXiv:2404.11999): losses and sequential KL.

Paste this file into any trainer; it needs torch alone. To try another objective edit `margin`, `preference_loss` or
`sum_tokens`: `tdpo_loss`, on logits, and `fused_tdpo_loss`, on hidden states, follow. All are sums, in nats."""
from collections import namedtuple

import torch
import torch.nn.functional as F

CHUNK_ROWS = 4096       # fused form: response tokens whose logits live at once; an eighth of it on a CPU
COMPILE_VOCAB = 8192    # fused form: from this vocabulary on, compiling the elementwise part pays for itself
_compiled = {}          # elementwise function -> its compiled form

# log pi(y) - log pi_ref(y), KL(pi_ref || pi) as in Eq. 10, KL(pi || pi_ref) as in Figures 1 and 3, log pi(y)
TokenStats = namedtuple("TokenStats", "logratio kl rkl logp")
Sums = namedtuple("Sums", "logratio kl rkl logp length")


def token_stats(pi_logits, ref_logits, labels, carry=TokenStats._fields):
    """What each token adds to the sums: TokenStats of (...) in nats, fp32 at least.

    pi_logits, ref_logits: (..., V), any float dtype, already aligned: the logits that predict labels (...).
    A label of -100 gives zeros. Gradients reach pi_logits alone, through the fields named in carry.
    Vocabulary entries masked with -inf in both logits add nothing."""
    wide = torch.promote_types(pi_logits.dtype, torch.float32)
    z, ref_z = pi_logits.to(wide), ref_logits.detach().to(wide)
    lse, ref_lse = z.logsumexp(-1, keepdim=True), ref_z.logsumexp(-1, keepdim=True)

    target = labels.clamp(min=0).unsqueeze(-1)
    logp = z.gather(-1, target) - lse           # from the logits: gathering log-probabilities would write them all out
    logratio = logp - (ref_z.gather(-1, target) - ref_lse)
    # never softmax().log(): 0 * -inf is NaN at gaps of 104 and more
    log_pi, log_ref = z - lse, ref_z - ref_lse
    stats = TokenStats(logratio.squeeze(-1), _kl(log_ref, log_pi), _kl(log_pi, log_ref), logp.squeeze(-1))
    stats = [torch.where(labels != -100, x, 0) for x in stats]
    return TokenStats(*[x if name in carry else x.detach() for name, x in zip(TokenStats._fields, stats)])


def _kl(logq, logp):
    """KL(q || p) over the last axis as the sum of q (e^d - 1 - d), d = log p - log q, which is that of -q d, as p and q
    both sum to 1. No term is negative, so first-order terms, far larger than a small KL, need not cancel in fp32."""
    q, p = logq.exp(), logp.exp()
    d = torch.where(q > 0, logp - logq, 0)          # where q is 0 the term is p
    small = (q > 0) & (d.abs() < 1)
    x = torch.where(small, d, 0)                    # keeps expm1, and its gradient, finite
    return torch.where(small, q * (x.expm1() - x), p - q - q * d).sum(-1)


def sum_tokens(tokens, labels, sequence, n):
    """TokenStats (N,) to Sums (n,): token t is one of response sequence[t]. A weight for each token goes in here."""
    length = (labels != -100).to(tokens.logp.dtype)
    return Sums(*[x.new_zeros(n).index_add(0, sequence, x) for x in (*tokens, length)])


def margin(method, w, l, beta=0.1, alpha=0.5):
    """beta * v (P,), the sigmoid's argument. w, l: Sums (P,) of chosen and rejected. ValueError: unknown method."""
    if method == "dpo":
        v = w.logratio - l.logratio                                     # Rafailov et al. 2023, Eq. 7
    elif method == "fdpo":      # with forward KL, Table 1's FKL row (Wang et al. 2024); e^80 is safe in fp32
        v = (-l.logratio).clamp(max=80).exp() - (-w.logratio).clamp(max=80).exp()
    elif method == "tdpo1":
        v = w.logratio - l.logratio - (l.kl - w.kl)                     # Eq. 15
    elif method == "tdpo2":
        v = w.logratio - l.logratio - alpha * (l.kl - w.kl.detach())    # Eq. 17 and 18: sg[.] is detach
    else:
        raise ValueError(f"unknown method {method!r}; it is one of dpo, fdpo, tdpo1, tdpo2")
    return beta * v


def preference_loss(method, w, l, beta=0.1, alpha=0.5):
    """-log sigmoid(beta v), a loss for each pair (P,), of that pair alone. Arguments and errors as in `margin`."""
    m = margin(method, w, l, beta, alpha)
    return -F.logsigmoid(m)


def _pair_losses(tokens, labels, sequence, n, yw_idx, yl_idx, beta, alpha, method):
    """From tokens to losses (P,) and detached stats, in both forms. Pair p's of n responses: yw_idx[p], yl_idx[p]."""
    sums = sum_tokens(tokens, labels, sequence, n)
    w, l = Sums(*[x[yw_idx] for x in sums]), Sums(*[x[yl_idx] for x in sums])
    losses = preference_loss(method, w, l, beta, alpha)
    stats = {"loss": losses, "margin": margin(method, w, l, beta, alpha)}
    for name in TokenStats._fields:
        stats[name + "_w"], stats[name + "_l"] = getattr(w, name), getattr(l, name)
    return losses, {name: x.detach() for name, x in stats.items()}


def tdpo_loss(pi_logits, ref_logits, labels, yw_idx, yl_idx, beta=0.1, alpha=0.5, method="tdpo2"):
    """The paper's Appendix B, mended: masked, shifted, summed over tokens before the sigmoid.

    pi_logits, ref_logits: (B, T, V). labels: (B, T), unshifted (labels[b, t] is the input token t), -100 outside the
    responses. yw_idx, yl_idx: (P,) rows of the chosen and of the rejected responses. Returns losses (P,) and stats, a
    dict of detached (P,): loss, margin, and logratio, kl, rkl, logp of either side as logratio_w, logratio_l ..."""
    labels, pi_logits, ref_logits = labels[:, 1:], pi_logits[:, :-1], ref_logits[:, :-1]    # t predicts token t + 1
    response = labels != -100           # select before reducing: NaN * 0 = NaN, no mask can remove a bad prompt row
    row, y = response.nonzero()[:, 0], labels[response]
    tokens = token_stats(pi_logits[response], ref_logits[response], y)
    return _pair_losses(tokens, y, row, len(labels), yw_idx, yl_idx, beta, alpha, method)


# The fused form: a token enters the loss only through its pair's sums, so a chunk of whole pairs can go forward and
# backward by itself, with two products each way and no tensor of N x V. Its gradient is autograd's own.
def fused_tdpo_loss(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen, beta=0.1, alpha=0.5, method="tdpo2"):
    """`tdpo_loss(...)[0].mean()` without N x V logits: they live for CHUNK_ROWS tokens (or one longer pair) at a time.

    hidden, ref_hidden: (N, d), the states that predict labels (N,). weight, ref_weight: (V, d), the output layers; a
    bias is one more column beside ones in hidden. pair: (N,) int, ascending from 0, and chosen: (N,) bool, best on the
    CPU. Returns the mean loss, stats as `tdpo_loss`. Products are autocast's. RuntimeError: a second derivative."""
    pair, chosen = pair.cpu(), chosen.cpu()
    equal = len(hidden) == len(ref_hidden) == len(labels) == len(pair) == len(chosen) > 0
    if not equal or not pair.unique_consecutive().equal(torch.arange(int(pair[-1]) + 1)):
        raise ValueError("give one entry for each of N > 0 tokens, sorted by pair: it must ascend from 0 without gaps")
    sequence = (2 * pair + chosen).to(hidden.device, non_blocking=True)     # rejected and chosen responses in turn
    carry = _carried(beta, alpha, method, hidden.device)

    def chunk_losses(rows, first, pairs, logits, ref_logits):
        tokens, among = elementwise(token_stats, logits, ref_logits, labels[rows], carry), sequence[rows] - 2 * first
        yw_idx, yl_idx = slice(1, None, 2), slice(0, None, 2)
        return _pair_losses(tokens, labels[rows], among, 2 * pairs, yw_idx, yl_idx, beta, alpha, method)
    return _by_chunks(chunk_losses, torch.bincount(pair), hidden, weight, (ref_hidden, ref_weight))


@torch.compiler.disable         # torch.compile does not trace what follows; the part that gains by it compiles itself
@torch.inference_mode(False)
@torch.enable_grad()
def _carried(beta, alpha, method, device):
    """The statistics that the objective differentiates, as a made-up pair tells: no gradient of others is carried."""
    probe = TokenStats(*torch.ones(4, 2, device=device, requires_grad=True).unbind())
    token = torch.arange(2, device=device)
    losses, _ = _pair_losses(probe, token, token, 2, slice(1, 2), slice(0, 1), beta, alpha, method)
    grads = zip(TokenStats._fields, torch.autograd.grad(losses.sum(), probe, allow_unused=True))
    return tuple(name for name, grad in grads if grad is not None)


def fused_sft_loss(hidden, weight, labels):
    """Cross-entropy by the same road: its mean over N > 0 tokens, none labelled -100, in nats; stats {"loss": (N,)}."""
    def chunk_losses(rows, first, n, logits):
        losses = elementwise(F.cross_entropy, logits, labels[rows], None, None, -100, None, "none")
        return losses, {"loss": losses.detach()}
    return _by_chunks(chunk_losses, torch.ones(len(labels), dtype=torch.long), hidden, weight)


@torch.compiler.disable
def _by_chunks(chunk_losses, lengths, hidden, weight, *frozen):
    """(mean loss, stats) of items of so many tokens each. chunk_losses(rows, first item, items, logits...) gives losses
    and stats of a chunk of whole items; frozen: further (hidden, weight), whose logits take no gradient."""
    device = hidden.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    wide = torch.promote_types(low, torch.float32)
    # rounded operands buy a GPU speed, but turn a KL of 3e-4 into 3e-3; a CPU may round them within its products alone
    dtype = low if device == "cuda" else wide
    fast = "bf16" if device == "cpu" and low != wide else None
    budget = CHUNK_ROWS if device == "cuda" else CHUNK_ROWS // 8
    train = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.no_grad(), torch.autocast(device, enabled=False), torch.backends.mkldnn.flags(None, None, None, fast):
        layers = [(h, w.to(dtype)) for h, w in ((hidden, weight), *frozen)]
        w_low, d_hidden = layers[0][1].to(low), torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=wide) if train and weight.requires_grad else None
        ends, found, first, begin = lengths.cumsum(0), [], 0, 0
        while first < len(ends):        # items first..last - 1 make a chunk: all that the budget allows, one at least
            last = max(first + 1, int(torch.searchsorted(ends, begin + budget, right=True)))
            rows = slice(begin, int(ends[last - 1]))
            logits = [_product(h[rows].to(dtype), w.T, wide) for h, w in layers]
            with torch.set_grad_enabled(train):
                losses, stats = chunk_losses(rows, first, last - first, logits[0].requires_grad_(train), *logits[1:])
            found.append(stats)
            if train:
                d_logits = torch.autograd.grad(losses, logits[0], torch.full_like(losses, 1 / len(ends)))[0].to(low)
                del logits              # room for the products
                d_hidden[rows] = d_logits @ w_low
                if d_weight is not None:        # in fp32: a sum rounded to bf16 at every chunk would be biased
                    d_weight += _product(d_logits.T, hidden[rows].to(low), wide)
            first, begin = last, rows.stop
    grads = d_hidden, None if d_weight is None else d_weight.to(weight.dtype)
    stats = {name: torch.cat([chunk[name] for chunk in found]) for name in found[0]}
    return _WithGradient.apply(stats["loss"].mean(), grads, hidden, weight), stats


class _WithGradient(torch.autograd.Function):       # a loss whose gradients to these tensors have been taken already
    @staticmethod
    def forward(ctx, loss, grads, *tensors):
        ctx.grads = grads
        return loss.clone()
    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("the fused loss has no second derivative; use tdpo_loss")
        return None, None, *[None if x is None else x * grad for x in ctx.grads]


def _product(a, b, wide):       # a @ b, accumulated in fp32; bf16 operands give fp32 on CUDA alone
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda and a.dtype != wide else a @ b


def elementwise(fn, logits, *rest):
    """fn(logits, *rest), compiled for a large vocabulary: one sweep over the logits, not a dozen temporaries."""
    if logits.shape[-1] < COMPILE_VOCAB:
        return fn(logits, *rest)
    with torch._dynamo.config.patch(suppress_errors=True):      # without a compiler it runs uncompiled, and says so
        return _compiled.setdefault(fn, torch.compile(fn, dynamic=True))(logits, *rest)
