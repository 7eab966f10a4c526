"""Token-level Direct Preference Optimization (Zeng et al., ICML 2024, arXiv:2404.11999): losses and sequential KL.

Paste this file into any trainer; it needs only torch. `tdpo_loss` takes logits; `fused_tdpo_loss` takes hidden states
and never holds the logits of a whole batch. To change the objective, edit `margin`, `preference_loss` or `sum_tokens`:
both forms follow. All sums run over response tokens and are in nats."""
from collections import namedtuple

import torch
import torch.nn.functional as F

CHUNK_BYTES = 2**29     # fused form: size of the fp32 logits of one model that exist at once; a quarter of it on a CPU
COMPILE_VOCAB = 8192    # fused form: the elementwise part is compiled for vocabularies of at least this size
_compiled = {}          # elementwise function -> its compiled form

# log pi(y) - log pi_ref(y), KL(pi_ref || pi) as in Eq. 10, KL(pi || pi_ref) as in Figures 1 and 3, log pi(y)
TokenStats = namedtuple("TokenStats", "logratio kl rkl logp")
Sums = namedtuple("Sums", [*TokenStats._fields, "length"])


def token_stats(pi_logits, ref_logits, labels):
    """What each token adds to the sums: TokenStats of (...) in nats, at least fp32.

    pi_logits, ref_logits: (..., V), any float dtype, already aligned: the logits that predict labels (...).
    Labels of -100, and vocabulary entries masked with -inf in both logits, add 0. Gradients reach only pi_logits."""
    wide = torch.promote_types(pi_logits.dtype, torch.float32)
    z, ref_z = pi_logits.to(wide), ref_logits.detach().to(wide)
    lse, ref_lse = z.logsumexp(-1, keepdim=True), ref_z.logsumexp(-1, keepdim=True)

    target = labels.clamp(min=0).unsqueeze(-1)
    logp = z.gather(-1, target) - lse           # from the logits: gathering log-probabilities would write them all out
    logratio = logp - (ref_z.gather(-1, target) - ref_lse)

    # never softmax().log(): 0 * -inf is NaN at gaps of 104 and more
    log_pi, log_ref = z - lse, ref_z - ref_lse
    stats = logratio.squeeze(-1), _kl(log_ref, log_pi), _kl(log_pi, log_ref), logp.squeeze(-1)
    return TokenStats(*[torch.where(labels != -100, x, 0) for x in stats])


def _kl(logq, logp):
    """KL(q || p) over the last axis, the sum of -q d with d = log p - log q. As p and q both sum to 1, that equals the
    sum of q (e^d - 1 - d), whose terms are never negative, so that nothing has to cancel in fp32."""
    q, p = logq.exp(), logp.exp()
    d = torch.where(q > 0, logp - logq, 0)      # if q is 0, the term is p
    small = (q > 0) & (d.abs() < 1)
    x = torch.where(small, d, 0)                # keeps expm1 and its gradient finite
    return torch.where(small, q * (x.expm1() - x), p - q - q * d).sum(-1)


def sum_tokens(tokens, labels, sequence, n):
    """TokenStats (N,) to Sums (n,): token t belongs to response sequence[t]. A weight for each token goes in here."""
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


def preference_loss(method, w, l, beta=0.1, **knobs):
    """Two (P,): -log sigmoid(beta v), a loss for each pair that depends on that pair only, and the margin beta v."""
    m = margin(method, w, l, beta, **knobs)
    loss = -F.logsigmoid(m)
    return loss, m


def _pair_losses(tokens, labels, sequence, n, yw_idx, yl_idx, method, knobs):
    """Losses (P,) and detached stats, for both forms. Of n responses, pair p has yw_idx[p] and yl_idx[p]."""
    sums = sum_tokens(tokens, labels, sequence, n)
    w, l = Sums(*[x[yw_idx] for x in sums]), Sums(*[x[yl_idx] for x in sums])
    losses, m = preference_loss(method, w, l, **knobs)
    stats = {"loss": losses.view_as(w.length), "margin": m}     # fails unless there is one loss for each pair
    for name in TokenStats._fields:
        stats[name + "_w"], stats[name + "_l"] = getattr(w, name), getattr(l, name)
    return losses, {name: x.detach() for name, x in stats.items()}


def tdpo_loss(pi_logits, ref_logits, labels, yw_idx, yl_idx, method="tdpo2", **knobs):
    """The paper's Appendix B, corrected: masked, shifted, and summed over tokens before the sigmoid.

    pi_logits, ref_logits: (B, T, V). labels: (B, T), unshifted (labels[b, t] is the input token t), -100 outside the
    responses. yw_idx, yl_idx: (P,) rows of the chosen and of the rejected responses. knobs: numbers that `margin` and
    `preference_loss` take, such as beta=0.1. Returns losses (P,) and stats, a dict of detached (P,): loss, margin, and
    logratio_w, logratio_l and so on of all TokenStats of both responses. ValueError: a response has no tokens."""
    labels, pi_logits, ref_logits = labels[:, 1:], pi_logits[:, :-1], ref_logits[:, :-1]    # t predicts token t + 1
    response = labels != -100
    if not response.any(1)[torch.cat([yw_idx, yl_idx])].all():
        raise ValueError("every pair needs chosen and rejected tokens: leave out pairs that truncation has emptied")
    # select before reducing: NaN * 0 is NaN, so no mask can remove a bad row of the prompt
    row, y = response.nonzero()[:, 0], labels[response]
    tokens = token_stats(pi_logits[response], ref_logits[response], y)
    return _pair_losses(tokens, y, row, len(labels), yw_idx, yl_idx, method, knobs)


@torch.compiler.disable     # torch.compile does not trace this function; its elementwise part compiles itself
def fused_tdpo_loss(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen, method="tdpo2", **knobs):
    """`tdpo_loss(...)[0].mean()` without N x V logits: about CHUNK_BYTES of those of each model exist at a time.

    hidden, ref_hidden: (N, d), the states that predict the response tokens labels (N,). weight, ref_weight: (V, d), the
    output layers; a bias is one more column beside ones in hidden. pair: (N,) int, ascending from 0, and chosen: (N,)
    bool, best on the CPU. Returns the mean loss, and stats as `tdpo_loss` does. The products follow autocast.
    ValueError: tokens are not sorted, or a response is missing. RuntimeError: a second derivative."""
    pair, chosen = pair.cpu(), chosen.cpu()
    equal = len(hidden) == len(ref_hidden) == len(labels) == len(pair) == len(chosen) > 0
    if not equal or (pair.diff() < 0).any():
        raise ValueError("hidden, ref_hidden, labels, pair, chosen: one entry for each of N > 0 tokens, sorted by pair")
    sequence = 2 * pair + chosen                    # 2p is the rejected response of pair p, and 2p + 1 the chosen one
    lengths = torch.bincount(sequence)
    if len(lengths) % 2 or not lengths.all():
        raise ValueError("each pair 0, 1, 2 ... needs chosen and rejected tokens: leave out emptied pairs, close gaps")
    ends = lengths.view(-1, 2).sum(1).cumsum(0)     # of the pairs

    # rounded operands make a GPU fast, but turn a KL of 3e-4 into 3e-3; a CPU may round them only within its products
    device = hidden.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    wide = torch.promote_types(low, torch.float32)
    dtype = low if device == "cuda" else wide
    precision = torch.backends.mkldnn.flags(None, None, None, "bf16" if device == "cpu" and low != wide else None)
    budget = max(1, (CHUNK_BYTES if device == "cuda" else CHUNK_BYTES // 4) // (4 * len(weight)))      # in tokens
    train = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)

    def statistics(rows, graph):    # TokenStats of these tokens and, with a graph, the logits that it leads back to
        logits = _product(hidden[rows].to(dtype), layer.T, wide).requires_grad_(graph)
        ref_logits = _product(ref_hidden[rows].to(dtype), ref_layer.T, wide)
        with torch.set_grad_enabled(graph):
            return elementwise(token_stats, logits, ref_logits, labels[rows]), logits if graph else None

    with torch.no_grad(), torch.autocast(device, enabled=False), precision:
        layer, ref_layer, low_layer = weight.to(dtype), ref_weight.to(dtype), weight.to(low)
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=wide) if train and weight.requires_grad else None
        found, first, begin = [], 0, 0
        while first < len(ends):
            # a chunk is as many whole pairs as fit; a longer pair goes in pieces, whose logits are computed twice
            last = max(first + 1, int(torch.searchsorted(ends, begin + budget, right=True)))
            end = int(ends[last - 1])
            pieces = [slice(i, min(i + budget, end)) for i in range(begin, end, budget)]
            parts = [statistics(rows, train and len(pieces) == 1) for rows in pieces]

            # tokens enter the loss only through their statistics, which are the leaves of a small graph of its own
            columns = [torch.cat(column) for column in zip(*[tokens for tokens, _ in parts])]
            leaves = TokenStats(*[x.detach().requires_grad_(train) for x in columns])
            local = (sequence[begin:end] - 2 * first).to(hidden.device, non_blocking=True)
            with torch.set_grad_enabled(train):
                losses, stats = _pair_losses(leaves, labels[begin:end], local, 2 * (last - first),
                                             slice(1, None, 2), slice(0, None, 2), method, knobs)
            found.append(stats)

            # the slope of the mean loss in each statistic leads back to the logits, then by two products to the inputs
            if train:
                slopes = torch.autograd.grad(losses, leaves, torch.full_like(losses, 1 / len(ends)), allow_unused=True)
                for rows in pieces:
                    tokens, logits = parts.pop(0)       # nothing else holds on to them
                    if logits is None:
                        tokens, logits = statistics(rows, graph=True)
                    piece = slice(rows.start - begin, rows.stop - begin)
                    outputs, weights = zip(*[(x, y[piece]) for x, y in zip(tokens, slopes) if y is not None])
                    d_logits = torch.autograd.grad(outputs, logits, weights)[0].to(low)
                    del logits, tokens, outputs     # make room for the products
                    d_hidden[rows] = d_logits @ low_layer
                    if d_weight is not None:    # in fp32: a sum rounded to bf16 at every chunk would be biased
                        d_weight += _product(d_logits.T, hidden[rows].to(low), wide)
            first, begin = last, end
    stats = {name: torch.cat([chunk[name] for chunk in found]) for name in found[0]}
    return _WithGradient.apply(stats["loss"].mean(), (d_hidden, d_weight), hidden, weight), stats


class _WithGradient(torch.autograd.Function):       # a loss whose gradients in these tensors have been taken already
    @staticmethod
    def forward(ctx, loss, grads, *tensors):
        ctx.grads = grads
        return loss.clone()
    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("the fused loss has no second derivative; use tdpo_loss")
        return None, None, *[None if x is None else x * grad for x in ctx.grads]


def _product(a, b, wide):       # a @ b, accumulated in fp32; only CUDA gives an fp32 product of bf16 operands
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda and a.dtype != wide else a @ b


def elementwise(fn, logits, *rest):
    """fn(logits, *rest), compiled for a large vocabulary: one sweep over the logits instead of a dozen temporaries."""
    if logits.shape[-1] < COMPILE_VOCAB:
        return fn(logits, *rest)
    with torch._dynamo.config.patch(suppress_errors=True):      # without a compiler it runs uncompiled, and says so
        return _compiled.setdefault(fn, torch.compile(fn, dynamic=True))(logits, *rest)
