"""Tests of the losses, the data layout and the scripts: python -m pytest. CPU, offline, under three minutes."""
import fcntl
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen3Config

import eval_imdb
import sample
import tdpo
import train

HERE = os.path.dirname(os.path.abspath(__file__))
BETA, ALPHA = 0.3, 0.7


# ---------------------------------------------------------------------------------------------------------------------
# an independent slow loop: the paper's equations with plain floats, one token and one vocabulary entry at a time


def slow_sequence(pi, ref, labels):
    """(logratio, kl, reverse_kl) of one sequence: lists of T x V logits and T unshifted labels."""
    r = kl = rkl = 0.0
    for t in range(len(labels) - 1):
        y = labels[t + 1]
        if y == -100:
            continue
        log_z, log_zr = (math.log(sum(math.exp(x) for x in row[t])) for row in (pi, ref))
        logp, logq = [x - log_z for x in pi[t]], [x - log_zr for x in ref[t]]
        r += logp[y] - logq[y]
        kl += sum(math.exp(b) * (b - a) for a, b in zip(logp, logq))
        rkl += sum(math.exp(a) * (a - b) for a, b in zip(logp, logq))
    return r, kl, rkl


def slow_losses(method, pi, ref, labels, yw, yl, frozen_kl_w=None):
    """Losses of all pairs; frozen_kl_w stands for sg[D_w] while the rest is perturbed."""
    losses, kls = [], []
    for n, (w, l) in enumerate(zip(yw, yl)):
        (rw, dw, _), (rl, dl, _) = (slow_sequence(pi[i], ref[i], labels[i]) for i in (w, l))
        kls.append(dw)
        sg = dw if frozen_kl_w is None else frozen_kl_w[n]
        v = {"dpo": rw - rl, "tdpo1": rw - rl - (dl - dw), "tdpo2": rw - rl - ALPHA * (dl - sg), "fdpo": math.exp(-rl) - math.exp(-rw)}[method]
        losses.append(math.log(1 + math.exp(-BETA * v)))
    return losses, kls


def random_case(seed=0, B=6, T=6, V=5):
    g = torch.Generator().manual_seed(seed)
    pi, ref = (torch.randn(B, T, V, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, V, (B, T), generator=g)
    for b in range(B):                                  # a prompt of 1 to 3 tokens before, padding behind
        labels[b, :1 + b % 3] = -100
        labels[b, T - b % 2:] = -100
    return pi, ref, labels, torch.tensor([0, 3, 2]), torch.tensor([1, 4, 5])


@pytest.mark.parametrize("method", tdpo.METHODS)
def test_loss_and_gradient_equal_the_slow_loop(method):
    pi, ref, labels, yw, yl = random_case()
    pi.requires_grad_()
    losses, stats = tdpo.tdpo_loss(pi, ref, labels, yw, yl, BETA, ALPHA, method)
    base = pi.detach().tolist(), ref.tolist(), labels.tolist(), yw.tolist(), yl.tolist()
    expected, kl_w = slow_losses(method, *base)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    for n, (w, l) in enumerate(zip(yw.tolist(), yl.tolist())):
        for side, i in (("w", w), ("l", l)):
            values = [stats[f"{name}_{side}"][n].item() for name in ("logratio", "kl", "rkl")]
            assert values == pytest.approx(slow_sequence(base[0][i], base[1][i], base[2][i]), rel=1e-12)
    losses.mean().backward()
    numeric, h = torch.zeros_like(pi), 1e-6
    for b, t, v in np.ndindex(*pi.shape):
        both = []
        for sign in (1, -1):
            base[0][b][t][v] += sign * h
            both.append(np.mean(slow_losses(method, *base, frozen_kl_w=kl_w)[0]))
            base[0][b][t][v] -= sign * h
        numeric[b, t, v] = (both[0] - both[1]) / (2 * h)
    assert torch.allclose(pi.grad, numeric, atol=1e-8)


def gradient(method, alpha=ALPHA):
    pi, ref, labels, yw, yl = random_case(1)
    pi.requires_grad_()
    losses, _ = tdpo.tdpo_loss(pi, ref, labels, yw, yl, BETA, alpha, method)
    return losses.detach(), torch.autograd.grad(losses.mean(), pi)[0]


def test_tdpo1_and_tdpo2_at_alpha_1_share_value_not_gradient():
    (value1, grad1), (value2, grad2) = gradient("tdpo1"), gradient("tdpo2", 1.0)
    assert torch.equal(value1, value2) and not torch.allclose(grad1, grad2, atol=1e-4)


def test_tdpo2_at_alpha_0_is_dpo():
    for a, b in zip(gradient("tdpo2", 0.0), gradient("dpo")):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", tdpo.METHODS)
def test_equal_models_give_log_2_and_no_divergence(method):
    pi, _, labels, yw, yl = random_case(T=50, V=300)
    losses, stats = tdpo.tdpo_loss(pi.float(), pi.float().clone(), labels, yw, yl, BETA, ALPHA, method)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-7)
    for name in ("kl_w", "kl_l", "rkl_w", "rkl_l", "logratio_w", "logratio_l"):
        assert stats[name].tolist() == [0.0] * 3


def test_prompt_and_padding_logits_change_nothing_and_labels_are_shifted():
    pi, ref, labels, yw, yl = random_case()
    expected, _ = tdpo.tdpo_loss(pi, ref, labels, yw, yl)
    predicts_nothing = torch.cat([labels[:, 1:] == -100, torch.ones(len(labels), 1, dtype=torch.bool)], 1)      # position t predicts token t + 1
    poisoned = pi.clone()
    poisoned[predicts_nothing] = math.nan
    poisoned.requires_grad_()
    losses, _ = tdpo.tdpo_loss(poisoned, ref, labels, yw, yl)
    losses.sum().backward()
    assert torch.equal(losses, expected) and torch.isfinite(poisoned.grad).all()
    assert (poisoned.grad.abs().sum(-1) > 0).equal(~predicts_nothing)


def test_extreme_logits_stay_finite():
    for gap in (1e2, 1e4):
        pi, ref, labels, yw, yl = random_case(B=6, T=6, V=9)
        pi, ref = (gap * pi).float(), (-gap * ref).float()
        for logits in (pi, ref):
            logits[..., 7:] = -math.inf                  # vocabulary entries masked in both
        labels = labels.clamp(max=4)
        pi.requires_grad_()
        for method in tdpo.METHODS:
            losses, stats = tdpo.tdpo_loss(pi, ref, labels, yw, yl, 0.1, 0.5, method)
            (grad,) = torch.autograd.grad(losses.sum(), pi)
            assert torch.isfinite(losses).all() and torch.isfinite(grad).all(), method
            assert all(torch.isfinite(x).all() and (x >= 0).all() for name, x in stats.items() if "kl" in name)


def test_bf16_logits_are_summed_in_fp32():
    pi, ref, labels, yw, yl = random_case()
    low = [x.bfloat16() for x in (pi, ref)]
    losses, stats = tdpo.tdpo_loss(*low, labels, yw, yl)
    assert losses.dtype == torch.float32 and torch.allclose(losses, tdpo.tdpo_loss(*(x.float() for x in low), labels, yw, yl)[0])
    assert {name: x.shape for name, x in stats.items()} == {name: (3,) for name in tdpo.STATS} and not any(x.requires_grad for x in stats.values())


def test_no_gradient_reaches_the_reference():
    pi, ref, labels, yw, yl = random_case()
    pi.requires_grad_(), ref.requires_grad_()
    tdpo.tdpo_loss(pi, ref, labels, yw, yl)[0].sum().backward()
    assert ref.grad is None


def test_unknown_method_lists_the_known_ones():
    zeros = torch.zeros(2)
    for call in (lambda: tdpo.preference_loss("tdpo3", zeros, zeros, zeros, zeros), lambda: tdpo.fused_tdpo_loss(*fused_case(), method="tdpo")):
        with pytest.raises(ValueError, match="dpo, fdpo, tdpo1, tdpo2"):
            call()


def test_compile_works_around_the_unfused_loss():
    pi, ref, labels, yw, yl = random_case()
    run = torch.compile(lambda x: tdpo.tdpo_loss(x, ref, labels, yw, yl)[0].sum())
    grads = [torch.autograd.grad(f(x), x)[0] for f in (run, lambda x: tdpo.tdpo_loss(x, ref, labels, yw, yl)[0].sum()) for x in [pi.clone().requires_grad_()]]
    assert torch.allclose(*grads, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# the fused form


def fused_case(seed=0, pairs=5, d=6, V=11, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    pair, chosen = [], []
    for n in range(pairs):
        lengths = torch.randint(1, 7, (2,), generator=g).tolist()
        pair += [n] * sum(lengths)
        chosen += [True] * lengths[0] + [False] * lengths[1]
    N, draw = len(pair), lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    return (draw(N, d).requires_grad_(), draw(V, d).requires_grad_(), draw(N, d), draw(V, d), torch.randint(0, V, (N,), generator=g),
            torch.tensor(pair), torch.tensor(chosen))


def unfused(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen, beta, alpha, method):
    """The same pairs through tdpo_loss: every response becomes a row of its own behind one prompt position."""
    P, N = int(pair[-1]) + 1, len(pair)
    logits, ref_logits = (torch.zeros(2 * P, N + 1, len(weight), dtype=hidden.dtype) for _ in range(2))
    rows = torch.full((2 * P, N + 1), -100)
    slot, place = 2 * pair + ~chosen, torch.zeros(N, dtype=torch.long)
    for n in range(N):
        place[n] = (slot[:n] == slot[n]).sum()
    logits, ref_logits = (x.index_put((slot, place), h @ w.T) for x, h, w in ((logits, hidden, weight), (ref_logits, ref_hidden, ref_weight)))
    rows[slot, place + 1] = labels
    return tdpo.tdpo_loss(logits, ref_logits, rows, torch.arange(0, 2 * P, 2), torch.arange(1, 2 * P, 2), beta, alpha, method)


@pytest.mark.parametrize("rows", (1, 9, 512))
@pytest.mark.parametrize("method", tdpo.METHODS)
def test_fused_equals_unfused(method, rows, monkeypatch):
    monkeypatch.setattr(tdpo, "CHUNK_ROWS", 8 * rows)
    case = fused_case()
    losses, expected_stats = unfused(*case, BETA, ALPHA, method)
    loss, stats = tdpo.fused_tdpo_loss(*case, BETA, ALPHA, method)
    assert torch.allclose(loss, losses.mean(), rtol=1e-12)
    for name in tdpo.STATS:
        assert torch.allclose(stats[name], expected_stats[name], rtol=1e-10, atol=1e-12), name
    for got, expected in zip(torch.autograd.grad(3 * loss, case[:2]), torch.autograd.grad(3 * losses.mean(), case[:2])):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert torch.equal(tdpo.fused_tdpo_loss(*case, BETA, ALPHA, method)[0], loss)


def test_fused_follows_an_edited_margin(monkeypatch):
    """README: to change the objective, edit margin."""
    monkeypatch.setattr(tdpo, "margin", lambda method, rw, rl, kw, kl, beta, alpha: beta * (rw - 2 * rl - alpha * (kl ** 2 - kw)))
    case = fused_case()
    got = torch.autograd.grad(tdpo.fused_tdpo_loss(*case, BETA, ALPHA, "mine")[0], case[:2])
    expected = torch.autograd.grad(unfused(*case, BETA, ALPHA, "mine")[0].mean(), case[:2])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(got, expected))


def test_fused_takes_a_bias_as_a_column_and_a_frozen_weight():
    hidden, weight, *rest = fused_case()
    bias = torch.randn(len(weight), dtype=weight.dtype, requires_grad=True)
    ones = torch.ones(len(hidden), 1, dtype=weight.dtype)
    with_column = lambda: (torch.cat([hidden, ones], 1), torch.cat([weight, bias[:, None]], 1), torch.cat([rest[0], 0 * ones], 1), torch.cat([rest[1], rest[1][:, :1]], 1), *rest[2:])
    got = torch.autograd.grad(tdpo.fused_tdpo_loss(*with_column(), BETA, ALPHA)[0], (hidden, weight, bias))
    expected = torch.autograd.grad(unfused(*with_column(), BETA, ALPHA, "tdpo2")[0].mean(), (hidden, weight, bias))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, expected))
    frozen = tdpo.fused_tdpo_loss(hidden, weight.detach(), *rest, BETA, ALPHA)[0]
    assert torch.allclose(torch.autograd.grad(frozen, hidden)[0], torch.autograd.grad(tdpo.fused_tdpo_loss(hidden, weight, *rest, BETA, ALPHA)[0], hidden)[0])


def test_fused_refuses_a_second_derivative_and_disordered_pairs():
    case = fused_case()
    with pytest.raises(RuntimeError, match="use tdpo_loss"):
        torch.autograd.grad(tdpo.fused_tdpo_loss(*case)[0], case[0], create_graph=True)
    with pytest.raises(ValueError, match="ascend"):
        tdpo.fused_tdpo_loss(*case[:5], case[5].flip(0), case[6])
    with pytest.raises(ValueError, match="one entry for each"):
        tdpo.fused_tdpo_loss(*case[:5], case[5][:-1], case[6])


def test_fused_is_accurate_in_fp32_and_under_bf16_autocast():
    """For KLs of 1e-3 and more: within 1e-4 of fp64 in fp32 and within 1 % under autocast. Products that round their operands to bf16, as on
    GPUs and some CPUs, give the KL of the rounded operands, here within 2 %; logits rounded to bf16, as of an ordinary output layer, are off by more."""
    hidden, weight, *rest = (x.detach() if x.is_floating_point() else x for x in fused_case(pairs=40, d=64, V=500))
    weight = 0.1 * weight
    rest[0], rest[1] = hidden + 0.05 * rest[0], weight.clone()
    exact = [hidden.requires_grad_(), weight.requires_grad_(), *rest]
    low = [x.detach().float().requires_grad_(n < 2) if x.is_floating_point() else x for n, x in enumerate(exact)]
    rounded = [x.detach().bfloat16().float() if x.is_floating_point() else x for x in exact]
    loss, expected = tdpo.fused_tdpo_loss(*exact)
    single, operands = tdpo.fused_tdpo_loss(*low)[1], tdpo.fused_tdpo_loss(*rounded)[1]
    with torch.autocast("cpu", torch.bfloat16):
        autocast_loss, autocast = tdpo.fused_tdpo_loss(*low)
        by_unfused = tdpo.token_stats(low[0] @ low[1].T, low[2] @ low[3].T, low[4])[1]
    for name in ("kl_w", "kl_l"):
        keep = expected[name] >= 1e-3
        error = lambda found: ((found[name] - expected[name]).abs() / expected[name])[keep].max()
        assert keep.sum() > 10 and error(single) < 1e-4 and error(autocast) < 1e-2 and error(operands) < 2e-2
    sums = torch.zeros(80, dtype=torch.float64).index_add(0, 2 * low[5] + low[6], by_unfused.double()).view(40, 2)
    assert ((sums[:, 0] - expected["kl_l"]).abs() / expected["kl_l"])[expected["kl_l"] >= 1e-3].max() > 2e-2
    for a, b in zip(torch.autograd.grad(autocast_loss, low[:2]), torch.autograd.grad(loss, exact[:2])):
        assert (a - b).norm() / b.norm() < 1e-2


@pytest.mark.parametrize("rows", (1, 9, 512))
def test_fused_sft_is_cross_entropy(rows, monkeypatch):
    monkeypatch.setattr(tdpo, "CHUNK_ROWS", 8 * rows)
    hidden, weight, _, _, labels, *_ = fused_case()
    losses = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    loss, stats = tdpo.fused_sft_loss(hidden, weight, labels)
    assert torch.allclose(loss, losses.mean(), rtol=1e-12) and torch.allclose(stats["loss"], losses, rtol=1e-12)
    for got, expected in zip(torch.autograd.grad(3 * loss, (hidden, weight)), torch.autograd.grad(3 * losses.mean(), (hidden, weight))):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fused_on_a_gpu_equals_fp64_on_the_same_bf16_operands():
    case = [x.detach() for x in fused_case(pairs=40, d=64, V=500)]
    low = [x.cuda().bfloat16() if x.is_floating_point() else x.cuda() for x in case]
    low[0].requires_grad_(), low[1].requires_grad_()
    exact = [x.detach().cpu().double() if x.is_floating_point() else x.cpu() for x in low]
    exact[0].requires_grad_(), exact[1].requires_grad_()
    (loss, stats), (expected, expected_stats) = tdpo.fused_tdpo_loss(*low), tdpo.fused_tdpo_loss(*exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3) and torch.allclose(stats["kl_l"].cpu().double(), expected_stats["kl_l"], rtol=1e-2)
    for a, b in zip(torch.autograd.grad(loss, low[:2]), torch.autograd.grad(expected, exact[:2])):
        assert (a.cpu().double() - b).norm() / b.norm() < 1e-2


def test_fused_takes_bf16_inputs():
    case = fused_case()
    low = [x.detach().bfloat16() if x.is_floating_point() else x for x in case]
    low[0].requires_grad_(), low[1].requires_grad_()
    loss, stats = tdpo.fused_tdpo_loss(*low)
    expected = tdpo.fused_tdpo_loss(*[x.detach().float() if x.is_floating_point() else x for x in low])[0]
    assert loss.dtype == stats["kl_w"].dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(loss, low[:2]))


def test_fused_compiles_its_elementwise_part_and_says_so_where_it_cannot(monkeypatch, capsys):
    case = fused_case(dtype=torch.float32)
    expected = torch.autograd.grad(tdpo.fused_tdpo_loss(*case, BETA, ALPHA)[0], case[0])[0]
    monkeypatch.setattr(tdpo, "COMPILE_VOCAB", 1)
    compiled = torch._dynamo.utils.counters["frames"]["ok"]
    assert torch.allclose(torch.autograd.grad(tdpo.fused_tdpo_loss(*case, BETA, ALPHA)[0], case[0])[0], expected, atol=1e-6)
    assert tdpo._compiled[tdpo._token_stats] is not tdpo._token_stats and torch._dynamo.utils.counters["frames"]["ok"] >= compiled + 2
    outer = torch.compile(lambda *x: tdpo.fused_tdpo_loss(*x, BETA, ALPHA)[0] * 2)
    assert torch.allclose(torch.autograd.grad(outer(*case), case[0])[0], 2 * expected, atol=1e-6)
    assert torch.allclose(torch.autograd.grad(torch.compile(tdpo.fused_tdpo_loss)(*case, BETA, ALPHA)[0], case[0])[0], expected, atol=1e-6)

    with pytest.raises(RuntimeError):                   # a mistake of the caller's says nothing about the compiler
        tdpo._elementwise(tdpo._token_stats, torch.randn(2, 3), torch.randn(2, 4), torch.tensor([0, 1]))
    assert tdpo._compiled[tdpo._token_stats] is not tdpo._token_stats and "uncompiled" not in capsys.readouterr().out

    def no_compiler(fn, **options):
        raise RuntimeError("no working compiler")
    monkeypatch.setattr(tdpo, "_compiled", {})
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert torch.equal(torch.autograd.grad(tdpo.fused_tdpo_loss(*case, BETA, ALPHA)[0], case[0])[0], expected)
    tdpo.fused_tdpo_loss(*case)
    said = capsys.readouterr().out
    assert said.count("_token_stats, so it runs uncompiled (slower): no working compiler") == 1 and said.count("_dlogits") == 1


# ---------------------------------------------------------------------------------------------------------------------
# packed rows


SIZES = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
    "llama": LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=False),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=48),
    "qwen3": Qwen3Config(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
}


def tiny(name, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def examples_of(seed=0, n=5, V=61):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, V, k).tolist() for k in rng.integers(2, 9, 3)) for _ in range(n)]


@pytest.mark.parametrize("attention", ("pairs", "dense"))
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_equal_separate_sequences(name, attention):
    """Loss and the gradient of every parameter: packed rows and the fused loss against padded rows and the unfused loss."""
    model, ref, examples = tiny(name), tiny(name, 1), examples_of()
    for m in (model, ref):
        m.set_attn_implementation("pair_attention")
    rows = sample.pack(list(map(sample.size, examples)), 40)
    assert sorted(sum(rows, [])) == [0, 1, 2, 3, 4] and max(map(len, rows)) > 1
    found = []
    for row in rows:
        batch = sample.collate(examples, row, 40 if attention == "dense" else 0, "cpu", attention)
        states = [f for m in (model, ref) for f in (sample.response_states(m.base_model, m, batch), sample.output_weight(m))]
        loss, stats = tdpo.fused_tdpo_loss(*states, batch["labels"], batch["pair"], batch["chosen"], BETA, ALPHA)
        (loss * len(row) / len(examples)).backward()
        found.append(stats)
    stats = {key: torch.cat([x[key] for x in found]) for key in tdpo.STATS}
    packed = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation("sdpa"), ref.set_attn_implementation("sdpa")

    order = sum(rows, [])
    sequences = [(examples[i][0], examples[i][k]) for i in order for k in (1, 2)]
    width = max(len(p) + len(r) for p, r in sequences)
    ids, labels, real = torch.zeros(len(sequences), width, dtype=torch.long), torch.full((len(sequences), width), -100), torch.zeros(len(sequences), width)
    for n, (p, r) in enumerate(sequences):
        ids[n, :len(p + r)], labels[n, len(p):len(p + r)], real[n, :len(p + r)] = torch.tensor(p + r), torch.tensor(r), 1
    logits, ref_logits = model(ids, attention_mask=real).logits, ref(ids, attention_mask=real).logits
    losses, expected = tdpo.tdpo_loss(logits, ref_logits, labels, torch.arange(0, len(ids), 2), torch.arange(1, len(ids), 2), BETA, ALPHA)
    losses.mean().backward()
    for key in tdpo.STATS:
        assert torch.allclose(stats[key], expected[key], atol=2e-6), key
    for key, p in model.named_parameters():
        assert torch.allclose(packed[key], p.grad, atol=2e-6), key


@pytest.mark.parametrize("name", CONFIGS)
def test_flex_attention_gives_the_same_states(name, monkeypatch):
    """Forward only: FlexAttention has no backward on a CPU. Uncompiled, as compiling it for a CPU would only test another kernel."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration
    calls = []
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", lambda *x, training=False, **options: calls.append(1) or flex_attention(*x, **options))
    model, examples = tiny(name), examples_of()
    model.set_attn_implementation("pair_attention")
    with torch.no_grad():
        flex, dense = (sample.response_states(model.base_model, model, sample.collate(examples, range(5), 128, "cpu", how)) for how in ("flex", "dense"))
    assert torch.allclose(flex, dense, atol=2e-6) and len(calls) == 2


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_a_compiled_body_takes_every_block_mask_with_one_graph(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as integration
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", lambda *x, training=False, **options: flex_attention(*x, **options))
    torch._dynamo.reset()
    model, before = tiny("gpt2"), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.set_attn_implementation("pair_attention")
    body = torch.compile(model.base_model, backend="eager", dynamic=False)
    with torch.no_grad():
        for seed in range(3):
            batches = [sample.collate(examples_of(seed), range(5), 128, "cpu", how) for how in ("flex", "dense")]
            states = [sample.response_states(b, model, batch) for b, batch in zip((body, model.base_model), batches)]
            assert torch.allclose(*states, atol=2e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


def test_models_that_packed_rows_cannot_serve_are_refused():
    examples = examples_of()
    choose = lambda model, name="it": sample.choose_attention([(name, model)], examples, "pairs")
    for name in CONFIGS:
        assert choose(tiny(name)) == "pairs"
    mistral = lambda window: AutoModelForCausalLM.from_config(MistralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, sliding_window=window)).eval()
    longest = max(len(p) + max(len(w), len(l)) - 1 for p, w, l in examples)
    assert choose(mistral(longest)) == "pairs"
    with pytest.raises(SystemExit, match="narrow window.*cannot be trained exactly here: its sliding_window of"):
        choose(mistral(longest - 1), "narrow window")
    from transformers import CohereConfig, FalconConfig, Gemma2Config, Gemma3TextConfig, GraniteConfig, MambaConfig
    gemma = dict(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    assert choose(AutoModelForCausalLM.from_config(Gemma3TextConfig(**gemma)).eval()) == "pairs"
    assert choose(AutoModelForCausalLM.from_config(FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)).eval()) == "dense"
    for config in (CohereConfig(**SIZES, intermediate_size=48, logit_scale=0.5), MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1),
                   Gemma2Config(**gemma, final_logit_softcapping=30.0, attn_logit_softcapping=None), GraniteConfig(**SIZES, intermediate_size=48, logits_scaling=1.001), Gemma2Config(**gemma, final_logit_softcapping=None, attn_logit_softcapping=5.0)):
        with pytest.raises(SystemExit, match="cannot be trained exactly"):
            choose(AutoModelForCausalLM.from_config(config).eval())


def test_an_output_bias_is_honoured():
    from transformers import PhiConfig
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PhiConfig(**SIZES, intermediate_size=48)).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    assert sample.choose_attention([("phi", model)], examples_of(), "pairs") == "pairs"


def test_pack_is_within_bounds_and_a_step_takes_each_pair_once_an_epoch():
    lengths = np.random.default_rng(0).integers(1, 100, 300).tolist()
    rows = sample.pack(lengths, 128)
    assert sorted(sum(rows, [])) == list(range(300)) and max(sum(lengths[i] for i in row) for row in rows) <= 128
    assert len(rows) <= 1.05 * sum(lengths) / 128 + 1
    seen = sum((train.step_indices(s, 8, 20, 3) for s in range(5)), [])
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20)) and seen[:20] != seen[20:]


def test_metrics_are_means_over_pairs():
    stats = {name: torch.tensor(x) for name, x in dict(loss=[1.0, 2.0], logratio_w=[1.0, -1.0], logratio_l=[0.5, 2.0], kl_w=[0.1, 0.2], kl_l=[4.0, 0.1], rkl_w=[1.0, 2.0],
                                                       rkl_l=[2.0, 1.0]).items()}
    found = {name: x.float().mean().item() for name, x in train.preference_metrics(stats, "tdpo2", 0.1, 0.5).items()}
    margins = [0.1 * (0.5 - 0.5 * 3.9), 0.1 * (-3 - 0.5 * -0.1)]
    assert found == pytest.approx(dict(loss=1.5, acc=0.5, acc_loss=0, margin=sum(margins) / 2, logratio_w=0, logratio_l=1.25, kl_w=0.15, kl_l=2.05, kl_gap=2.0, rkl_w=1.5,
                                       rkl_l=1.5, rkl_gap=1.0))


# ---------------------------------------------------------------------------------------------------------------------
# text to tokens


@pytest.fixture(scope="session")
def words():
    return eval_imdb.scratch_model(0)[1]


def test_tokenize_truncates_as_dpo_does(words):
    pairs = [("x", "the plot was dull and the music", " was weak .", " felt fresh and warm and clever ."), ("y", "i saw", " this film .", " this film . loved")]
    (p, w, l), (p2, w2, l2) = sample.tokenize(pairs, words, 100, 50, "left")[0]
    assert words.decode(p) == pairs[0][1] and w[-1] == l[-1] == words.eos_token_id and len(l) == 8
    examples, kept, truncated = sample.tokenize(pairs, words, 6, 3, "left")
    assert truncated == 2 and words.decode(examples[0][0]) == "and the music" and len(examples[0][2]) == 3
    assert words.decode(sample.tokenize(pairs, words, 6, 3, "right")[0][0][0]) == "the plot was"
    assert kept == [0, 1] and sample.tokenize(pairs, words, 5, 2, "left")[1] == [0]          # "this film ." twice is no pair
    assert sample.tokenize_texts(["the plot was dull", "the"], words, 3) == [(words("the")["input_ids"], words("plot was")["input_ids"], []), (words("the")["input_ids"], [0], [])]


def test_render_takes_strings_messages_and_transcripts(words):
    assert sample.render(dict(prompt="a", chosen=" b", rejected=" c"), words) == ("a", " b", " c")
    hh = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
    assert sample.render(dict(chosen=hh + " well", rejected=hh + " badly"), words) == (hh, " well", " badly")
    words.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    user, good, bad = dict(role="user", content="q"), dict(role="assistant", content="good"), dict(role="assistant", content="bad")
    expected = ("<user>q<eos>\n<assistant>", "good", "bad")
    assert sample.render(dict(prompt=[user], chosen=[good], rejected=[bad]), words) == expected
    assert sample.render(dict(prompt="ignored", chosen=[user, good], rejected=[user, bad]), words) == expected
    words.chat_template = None


def test_generation_is_seeded_stops_at_eos_and_measures_what_it_says():
    model, words = eval_imdb.scratch_model(0)
    prompts = [words("the plot")["input_ids"], words("i saw this film")["input_ids"]]
    a, b, c = (sample.generate(model, words, prompts, 12, 3, seed=s) for s in (1, 1, 2))
    model.generation_config.repetition_penalty = 3.0     # a model's own sampling habits are not the policy
    assert a == sample.generate(model, words, prompts, 12, 3, seed=1) and model.generation_config.repetition_penalty == 3.0
    assert a == b != c and [len(x) for x in a] == [3, 3] and all(0 not in r[:-1] and len(r) <= 12 for x in a for r in x)
    many = sum(sample.generate(model, words, prompts, 12, 100), [])
    assert all(len(r) == 12 or r[-1] == words.eos_token_id for r in many) and min(map(len, many)) < 12
    other = eval_imdb.scratch_model(1)[0]
    stats = sample.response_stats(model, other, prompts, [a[0][0], a[1][0]])
    for i, response in enumerate((a[0][0], a[1][0])):
        ids = torch.tensor([prompts[i] + response])
        n = len(response)
        logp, logq = (m(ids).logits[0, -n - 1:-1].double().log_softmax(-1) for m in (model, other))
        assert stats["entropy"][i] == pytest.approx(-(logp.exp() * logp).sum(-1).mean().item(), rel=1e-4)
        assert stats["surprisal"][i] == pytest.approx(-logp[range(n), response].mean().item(), rel=1e-4)
        assert stats["kl"][i] == pytest.approx((logq.exp() * (logq - logp)).sum().item(), rel=1e-3)
        assert stats["reverse_kl"][i] == pytest.approx((logp.exp() * (logp - logq)).sum().item(), rel=1e-3)


def test_score_policy_gives_means_and_standard_errors():
    model, words = eval_imdb.scratch_model(0)
    found = eval_imdb.score_policy(model, model, words, ["the plot", "i saw", "a film", "we watched"], lambda texts: [1.0, 2.0, 3.0, 6.0], 8)
    assert found["n"] == 4 and found["reward"] == 3 and found["reward_se"] == pytest.approx((14 / 3) ** 0.5 / 2) and found["sample_kl"] == 0
    assert 0 < found["entropy"] < math.log(len(words)) and found["entropy_se"] > 0


def test_exact_reward():
    assert eval_imdb.exact_reward(["a dull film", "superb and warm but weak", "a film"]) == [-1.0, pytest.approx(1 / 3), 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# the scripts, run as users do


def script(name, *args, fresh=False):
    """Run a script: (exit code, output). In this process unless fresh, which saves the imports."""
    path = os.path.join(HERE, name)
    if fresh:
        done = subprocess.run([sys.executable, path, *args], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr
    import contextlib
    import io
    out, code, argv, kept = io.StringIO(), 0, sys.argv, sys.excepthook
    sys.argv = [path, *args]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        out.write(stop.code if isinstance(stop.code, str) else "")
    finally:
        sys.argv, sys.excepthook = argv, kept
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for file in os.listdir("/proc/self/fd"):                # of its directory, which would be free with the end of its process
            if os.path.exists(f"/proc/self/fd/{file}") and os.readlink(f"/proc/self/fd/{file}").endswith(".lock"):
                fcntl.flock(int(file), fcntl.LOCK_UN)
        sample.AttentionInterface.register("pair_attention", sample.pair_attention)     # sample.py, run as a script, registered its own copy
    return code, out.getvalue()


def log_of(folder):
    return [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """An SFT model, a TDPO2 run of the sentiment task on it, a file of pairs; made with the scripts, as subprocesses."""
    folder = tmp_path_factory.mktemp("runs")
    sft, tdpo2, pairs = str(folder / "sft"), str(folder / "tdpo2"), str(folder / "pairs.jsonl")
    code, out = script("train.py", "--method=sft", f"--out_dir={sft}", "--max_steps=40", "--eval_pairs=64", "--log_interval=20", fresh=True)
    assert code == 0, out
    code, out = script("train.py", f"--init_from={sft}", f"--out_dir={tdpo2}", "--max_steps=8", "--train_prefixes=48", "--eval_prefixes=24", "--eval_interval=4", fresh=True)
    assert code == 0, out
    rng = __import__("random").Random(0)
    with open(pairs, "w") as f:
        for _ in range(60):
            a, b = (eval_imdb.write_review(rng).split() for _ in range(2))
            f.write(json.dumps(dict(prompt=" ".join(a[:4]), chosen=" " + " ".join(a[4:24]), rejected=" " + " ".join(b[4:30]))) + "\n")
    return dict(sft=sft, tdpo2=tdpo2, pairs=pairs, output=out, folder=str(folder))


def train_on_pairs(runs, out_dir, *args):
    code, out = script("train.py", *options_on_pairs(runs, out_dir, *args))
    assert code == 0, out
    return os.path.join(runs["folder"], out_dir)


def test_the_sentiment_task_end_to_end(runs):
    log = log_of(runs["tdpo2"])
    first, steps = log[0], [x for x in log if "loss" in x]
    assert first["step"] == 0 and first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval_kl_w"] == first["eval_kl_l"] == first["eval_sample_kl"] == 0 and first["eval_n"] == 24
    assert [x["step"] for x in steps] == list(range(1, 9)) and [x["lr"] for x in steps] == pytest.approx([1e-4 * n / 20 for n in range(1, 9)])
    for name in ("loss acc acc_loss margin logratio_w logratio_l kl_w kl_l kl_gap rkl_w rkl_l rkl_gap").split():
        assert all(math.isfinite(x[name]) for x in steps) and math.isfinite(first["eval_" + name])
    for name in "epoch lr grad_norm pairs_per_s tokens_per_s peak_gib".split():
        assert all(x[name] > 0 for x in steps)
    for name in ("reward", "sample_kl", "sample_rkl", "entropy"):
        assert math.isfinite(log[-1]["eval_" + name]) and log[-1]["eval_" + name + "_se"] > 0
    assert log[-1]["step"] == 8 and log[-1]["eval_kl_l"] > 0
    assert runs["output"].rstrip().splitlines()[-1] == f"saved {runs['tdpo2']} | next: python sample.py --model={runs['tdpo2']}"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(runs["tdpo2"]), AutoTokenizer.from_pretrained(runs["tdpo2"])
    assert tokenizer.decode(model.generate(**tokenizer("the plot", return_tensors="pt"), max_new_tokens=4)[0]).startswith("the plot ")


def test_pairs_are_kept_labelled_and_reused(runs):
    (path,) = [os.path.join(runs["folder"], x) for x in os.listdir(runs["folder"]) if x.startswith("reviews-pairs-")]
    rows = [json.loads(line) for line in open(path)]
    assert len(rows) > 20 and all(list(r) == ["prompt", "chosen", "rejected", "chosen_score", "rejected_score"] for r in rows)
    assert all(r["chosen_score"] - r["rejected_score"] > 0.1 for r in rows) and all(2 <= len(r["prompt"].split()) <= 8 for r in rows)
    for side in ("chosen", "rejected"):
        assert [r[side + "_score"] for r in rows] == eval_imdb.exact_reward([r["prompt"] + r[side] for r in rows])
    common = [f"--init_from={runs['sft']}", "--method=dpo", "--max_steps=1", "--train_prefixes=48", "--eval_prefixes=2"]
    assert f"reusing {path}" in script("train.py", *common, f"--out_dir={runs['folder']}/dpo")[1]
    assert "pairs: sampling" in script("train.py", *common, "--seed=2", f"--out_dir={runs['folder']}/dpo2")[1]
    code, out = script("train.py", *common, "--min_score_gap=3", f"--out_dir={runs['folder']}/dpo3")
    assert code == 1 and "every pair was dropped" in out and "--min_score_gap" in out and os.listdir(f"{runs['folder']}/dpo3") == [".lock"]


def test_a_classifier_is_a_reward(words, tmp_path):
    from transformers import AutoModelForSequenceClassification
    for labels in (["NEGATIVE", "POSITIVE"], ["bad", "good"]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=len(words), n_embd=32, n_layer=1, n_head=2, n_positions=64, pad_token_id=0, num_labels=2, id2label=dict(enumerate(labels)),
                            label2id={x: i for i, x in enumerate(labels)})
        model = AutoModelForSequenceClassification.from_config(config).eval()
        model.save_pretrained(tmp_path / labels[0]), words.save_pretrained(tmp_path / labels[0])
    texts = ["the plot was dull", "i loved this wonderful film and the music", "a drama"]
    expected = [model(**words(x, return_tensors="pt")).logits.softmax(-1)[0, 1].item() for x in texts]
    assert eval_imdb.load_reward(str(tmp_path / "NEGATIVE"))(texts) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(SystemExit, match="one must be called positive"):
        eval_imdb.load_reward(str(tmp_path / "bad"))
    assert eval_imdb.load_reward(str(tmp_path / "NEGATIVE"))(["the plot " * 90])[0] > 0         # longer than its 64 positions
    more = eval_imdb.scratch_model(0)[1]
    more.add_tokens(["more"]), more.save_pretrained(tmp_path / "NEGATIVE")
    with pytest.raises(SystemExit, match=r"its tokenizer has ids up to \d+, its model knows \d+ tokens"):
        eval_imdb.load_reward(str(tmp_path / "NEGATIVE"))
    plain = eval_imdb.scratch_model(0)[1]
    plain.pad_token = plain.eos_token = None                    # nothing to pad with: said before anything is sampled
    plain.save_pretrained(tmp_path / "NEGATIVE")
    with pytest.raises(SystemExit, match="cannot score texts"):
        eval_imdb.load_reward(str(tmp_path / "NEGATIVE"))


def test_texts_of_ones_own(words, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(dict(text=f"the plot was<br />dull and number {n}", split="train" if n % 2 else "test")) + "\n" for n in range(6)))
    run = dict(data="imdb", texts=str(path), seed=1, train_prefixes=9, eval_prefixes=2, strict=False)
    texts = eval_imdb.load_texts(run)
    assert sorted(texts["train"]) == [f"the plot was dull and number {n}" for n in (1, 3, 5)] and len(texts["test"]) == 3
    prefixes = eval_imdb.task_prefixes(run, words)
    assert len(prefixes["train"]) == 3 and len(prefixes["test"]) == 2
    assert all("the plot was dull and".startswith(x) or x.startswith("the plot was dull and") for x in prefixes["train"])
    path.write_text('{"text": 3}\n')
    with pytest.raises(SystemExit, match="line 1 has no text"):
        eval_imdb.load_texts(run)
    for row, said in ((dict(text="a", split=["train"]), "a split that is no text"), (dict(text="a\ud800"), "half a surrogate pair")):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(SystemExit, match="line 1 has " + said):
            eval_imdb.load_texts(run)


def test_wandb_gets_what_the_log_gets(runs, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("got = []\ndef init(**options): got.append(options)\ndef log(record, step): got.append((step, record))\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = train_on_pairs(runs, "with-wandb", "--max_steps=1", "--wandb_log=True")
    import wandb
    assert wandb.got[0]["config"]["max_steps"] == 1 and [r for _, r in wandb.got[1:]] == log_of(folder)
    del sys.modules["wandb"]


def test_sample_and_eval_scripts(runs):
    code, out = script("sample.py", f"--model={runs['tdpo2']}", "--num_prompts=2", "--num_samples=2", fresh=True)
    assert code == 0 and re.search(r"reference \| n 4 \| entropy", out) and re.search(r"policy    \| n 4 \| .*reward .*kl", out), out
    rows = [json.loads(line) for line in open(os.path.join(runs["tdpo2"], "samples.jsonl"))]
    assert [r["model"] for r in rows] == ["reference"] * 4 + ["policy"] * 4 and all(r["score"] is not None for r in rows)
    code, out = script("sample.py", f"--model={runs['sft']}", "--prompt=the plot was", f"--out={runs['folder']}/one.jsonl")
    assert code == 0 and len(open(f"{runs['folder']}/one.jsonl").readlines()) == 1, out
    code, out = script("sample.py", f"--model={runs['sft']}", f"--prompts={runs['pairs']}", f"--out={runs['folder']}/more.jsonl")
    assert code == 0 and len(open(f"{runs['folder']}/more.jsonl").readlines()) == 8
    code, out = script("eval_imdb.py", f"--runs={runs['tdpo2']}", "--eval_prefixes=16", f"--out={runs['folder']}/frontier", fresh=True)
    assert code == 0 and "| reference |" in out and "| tdpo2 α=0.5 |" in out, out
    reference, run = json.load(open(f"{runs['folder']}/frontier.json"))
    assert reference["sample_kl"] == 0 < run["sample_kl"] and run["step"] == 8 and run["n"] == 16
    code, out = script("eval_imdb.py", f"--runs={runs['folder']}/tdp*", "--eval_prefixes=0", f"--out={runs['folder']}/logged")
    reference, run = json.load(open(f"{runs['folder']}/logged.json"))
    last = log_of(runs["tdpo2"])[-1]
    assert code == 0 and [run[k] for k in ("n", "reward", "sample_rkl")] == [pytest.approx(last["eval_" + k], abs=1e-5) for k in ("n", "reward", "sample_rkl")]
    assert [x["step"] for x in run["evals"]] == [0, 4, 8] and [x["step"] for x in run["curves"]] == [8]
    assert run["curves"][0]["kl_l"] == pytest.approx(np.mean([x["kl_l"] for x in log_of(runs["tdpo2"]) if "loss" in x]), abs=1e-4)
    elsewhere = __import__("shutil").copytree(runs["tdpo2"], runs["folder"] + "/elsewhere", ignore=lambda *_: ["options.json", "log.jsonl"])
    code, out = script("eval_imdb.py", f"--runs={runs['tdpo2']}", f"--also={elsewhere}", "--eval_prefixes=16", f"--out={runs['folder']}/also")
    _, run, other = json.load(open(f"{runs['folder']}/also.json"))
    assert code == 0 and "| elsewhere |" in out and other["evals"] == [] and all(run[k] == other[k] for k in eval_imdb.SCORES)


def test_intervals_and_rewards_at_matched_kl():
    assert eval_imdb.interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.303 / 3**0.5), rel=1e-3)          # t with 2 degrees of freedom
    assert eval_imdb.interval([1.0], [0.5]) == pytest.approx((1, 0.98))
    assert eval_imdb.interval([1.0, 1.0], [0.3, 0.4]) == pytest.approx((1, 1.96 * 0.25))                # seeds that agree by chance are no surer than their samples
    evals = [dict(sample_rkl=k, reward=r, reward_se=0.1) for k, r in ((0, 0), (2, 0.4), (4, 0.5), (3, 0.9))]
    assert [eval_imdb.reward_at(evals, x) for x in (1, 3.5, 5)] == [pytest.approx((0.2, 0.1)), pytest.approx((0.475, 0.1)), None]
    one = dict(label="dpo", n=9, entropy=1.0, sample_kl=1.0, sample_rkl=2.0, evals=evals, **{x + "_se": 0.1 for x in eval_imdb.SCORES})
    lines = eval_imdb.table([dict(one, reward=0.4), dict(one, reward=0.6, evals=evals[:2]), dict(one, label="tdpo1", reward=0.5)], [1, 3, 5])
    assert lines[2] == "| dpo | 0.500 ± 1.271 | 2.000 ± 0.139 | 1.000 ± 0.139 | 1.000 ± 0.139 | 0.200 ± 0.139 | 0.450 ± 0.196 (1 of 2) | – | 2 × 9 |"
    assert lines[3] == "| tdpo1 | 0.500 ± 0.196 | 2.000 ± 0.196 | 1.000 ± 0.196 | 1.000 ± 0.196 | 0.200 ± 0.196 | 0.450 ± 0.196 | – | 1 × 9 |"
    pairs = dict(label="dpo", pairs=100, acc=0.5, acc_loss=0.6, kl_w=1.0, kl_l=2.0, acc_se=0.05, acc_loss_se=0.04, entropy=3.0, entropy_se=0.1, surprisal=2.5, surprisal_se=0.2, prompts=16)
    assert eval_imdb.preference_table([pairs])[2] == "| dpo | 0.500 ± 0.098 | 0.600 ± 0.078 | 1.000 | 2.000 | 3.000 ± 0.213 | 2.500 ± 0.426 | 100 | 16 |"


def test_the_readmes_tables_are_those_of_the_assets():
    readme = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    for name, levels in (("reviews", [0.3, 1, 2]), ("imdb", [1, 2, 3])):
        path = os.path.join(HERE, "assets", name + ".json")
        assert "\n".join(eval_imdb.table(json.load(open(path)), levels)) in readme and os.path.getsize(path) < 300 * 1024
    elsewhere = {r["label"]: "{:.3f} ± {:.3f}".format(*eval_imdb.interval([r["reward"]], [r["reward_se"]])) for r in json.load(open(os.path.join(HERE, "assets", "grpo.json")))}
    assert "gives reward {trl-grpo} at KL".format(**elsewhere) in readme and "beside {dpo} at".format(**elsewhere) in readme and elsewhere["tdpo2 α=0.5"] in readme
    for line in eval_imdb.preference_table(json.load(open(os.path.join(HERE, "assets", "hh.json"))))[2:]:        # the README has the paper's columns before ours
        method, ours = line.split(" | ", 1)
        assert any(x.startswith(method + " | ") and x.endswith(" | " + ours) for x in readme.splitlines()), line


def test_runs_on_pairs_make_table_1(runs):
    folder = train_on_pairs(runs, "table1", "--max_steps=8", "--learning_rate=1e-3")
    code, out = script("sample.py", f"--model={folder}", "--num_samples=5", "--num_prompts=4", "--max_new_tokens=12")
    code, out = script("eval_imdb.py", f"--runs={folder}", f"--out={runs['folder']}/table1x")
    (row,) = json.load(open(f"{runs['folder']}/table1x.json"))
    last, samples = log_of(folder)[-1], [x for x in map(json.loads, open(folder + "/samples.jsonl")) if x["model"] == "policy"]
    assert code == 0 and row["acc"] == last["eval_acc"] and row["pairs"] == last["eval_pairs"] == 5 and row["prompts"] == 4, out
    tokens = [x["tokens"] for x in samples]
    assert len(samples) == 20 and row["entropy"] == pytest.approx(np.average([x["entropy"] for x in samples], weights=tokens))
    sums = [np.sum([[x["entropy"] * x["tokens"], x["tokens"]] for x in samples if x["prompt"] == prompt], 0) for prompt in dict.fromkeys(x["prompt"] for x in samples)]
    spread = [total - row["entropy"] * count for total, count in sums]          # a ratio of sums over prompts: its linearized standard error
    assert row["entropy_se"] == pytest.approx(2 * np.std(spread, ddof=1) / sum(tokens)) and row["acc_se"] == pytest.approx((row["acc"] * (1 - row["acc"]) / 5) ** 0.5)
    assert f"| tdpo2 α=0.5 | {row['acc']:.3f} ± " in out


def test_answers_load_in_fastchat_and_alpaca_eval(runs, tmp_path):
    import shutil
    shutil.copytree(runs["sft"], model := tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(model)
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(dict(question_id=n, category="x", turns=["the plot", "the music"][:n])) + "\n" for n in (1, 2)))
    (tmp_path / "instructions.jsonl").write_text(json.dumps(dict(instruction="the plot", dataset="reviews")) + "\n")
    os.mkdir(tmp_path / "model_answer")
    common = [f"--model={model}", "--max_new_tokens=9"]
    code, out = script("sample.py", *common, "--format=mt_bench", f"--prompts={tmp_path}/question.jsonl", f"--out={tmp_path}/model_answer/tiny.jsonl")
    assert code == 0 and "wrote 2 answers" in out, out
    code, out = script("sample.py", *common, "--format=alpaca_eval", f"--prompts={tmp_path}/instructions.jsonl", f"--out={tmp_path}/tiny.json")
    assert code == 0 and json.load(open(tmp_path / "tiny.json"))[0]["output"], out
    code, out = script("sample.py", *common, "--format=mt_bench", f"--prompts={tmp_path}/instructions.jsonl", f"--out={tmp_path}/model_answer/bad.jsonl")
    assert code == 1 and "instructions.jsonl line 1 needs question_id and turns" in out
    os.remove(tmp_path / "model_answer/bad.jsonl")
    fastchat = pytest.importorskip("fastchat.llm_judge.common")
    answers = fastchat.load_model_answers(str(tmp_path / "model_answer"))
    assert [len(answers["tiny"][n]["choices"][0]["turns"]) for n in (1, 2)] == [1, 2] and all(answers["tiny"][2]["choices"][0]["turns"])
    alpaca = pytest.importorskip("alpaca_eval.utils")
    frame = alpaca.load_or_convert_to_dataframe(str(tmp_path / "tiny.json"))
    assert alpaca.get_generator_name(None, frame) == "tiny" and list(frame.instruction) == ["the plot"]


# ---------------------------------------------------------------------------------------------------------------------
# the README's examples, run as they stand there


def readme_block(containing, language="python"):
    blocks = re.findall(rf"```{language}\n(.*?)```", open(os.path.join(HERE, "README.md"), encoding="utf-8").read(), re.S)
    (found,) = [x for x in blocks if containing in x]
    return found


def own_loss(model, ref, examples):
    """The mean tdpo2 loss of pairs, as train.py takes it."""
    batch = sample.collate(examples, list(range(len(examples))), attention="dense")
    with torch.no_grad():
        states = [sample.response_states(m.base_model, m, batch) for m in (model, ref)]
        return tdpo.fused_tdpo_loss(states[0], sample.output_weight(model), states[1], sample.output_weight(ref), *(batch[x] for x in ("labels", "pair", "chosen")), 0.1, 0.5)[0].item()


def test_the_loops_of_the_readme_run_again_what_has_not_finished(tmp_path, monkeypatch):
    """They run as they stand with a stub in python's place, which prints an SFT run's last line before its own, and fails once in TDPO1, on IMDb after it saved."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("""#!/bin/bash
echo "$*" >> calls
for word; do case $word in --out_dir=*|--model=*) d=${word#*=};; esac; done
case $1 in
    sample.py) mkdir -p $d; echo {} > $d/samples.jsonl;;
    train.py) mkdir -p $d; echo "saved out/sft | next: python"
        if [[ $d == *tdpo1 && ! -e died-${d//\\//-} ]]; then touch died-${d//\\//-}; [[ $d == out/imdb/* ]] && touch $d/config.json; echo "error: it failed"; exit 1; fi
        echo "saved $d | next: python";;
esac
""")
    (tmp_path / "bin" / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for name in ("models/smollm2/config.json", "models/judge/config.json", "imdb.parquet", "hh_helpful_train.jsonl", "hh_helpful_test.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    script, passes = "\n".join(readme_block(f"mkdir -p {x}", "bash") for x in ("out/sweep", "out/imdb", "out/hh")) + "\nwait", []
    for _ in range(2):
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=dict(os.environ, PATH=f"{tmp_path}/bin:{os.environ['PATH']}"), capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        passes.append([x.split() for x in (tmp_path / "calls").read_text().splitlines()])
        (tmp_path / "calls").unlink()
        assert done.stdout.count("error: it failed") == (8 if len(passes) == 1 else 0)
    resumed = [x for x in passes[1] if x[-1] == "--resume=True"]
    assert sorted(resumed) == [["train.py", f"--out_dir=out/imdb/{s}-tdpo1", "--resume=True"] for s in (1, 2)]
    trained, again = (["{out_dir} {method} {alpha} {beta} {seed}".format(**train.configure(x[1:])) for x in calls if x[0] == "train.py" and x not in resumed] for calls in passes)
    methods, small = ["dpo dpo 0.5 0.1", "tdpo1 tdpo1 0.5 0.1"], ["tdpo2-alpha=0.5 tdpo2 0.5 0.1", "tdpo2-alpha=1 tdpo2 1.0 0.1"]
    expected = [f"out/sweep/{s}-{x} {s}" for s in range(1, 6) for x in [*methods, "fdpo fdpo 0.5 0.1", *small, *(f"tdpo2-alpha={a} tdpo2 {float(a)} 0.1" for a in ("1.5", "2", "5"))]]
    expected += [f"out/imdb/{s}-{x} {s}" for s in (1, 2) for x in methods + small] + ["out/imdb/sft sft 0.5 0.1 1", "out/hh/sft sft 0.5 0.1 1"]
    expected += [f"out/hh/{x} 1" for x in [*methods, "fdpo fdpo 0.5 0.03", "tdpo2 tdpo2 0.5 0.1"]]
    assert sorted(trained) == sorted(expected)
    assert sorted(again) == sorted(x for x in expected if " tdpo1 " in x and "imdb" not in x)
    assert [len([x for x in calls if x[0] == "sample.py"]) for calls in passes] == [4, 0]


def test_the_plain_loop_of_the_readme(runs):
    (ref, tokenizer), model = sample.load_model(runs["sft"]), sample.load_model(runs["tdpo2"])[0]
    examples = sample.tokenize(sample.read_pairs(runs["pairs"], tokenizer), tokenizer, 64, 16, "left")[0][:12]
    expected, seen = own_loss(model, ref, examples[:8]), []
    scope = dict(model=model, ref=ref, batches=[examples[:8], examples[8:]], print=lambda *x: seen.append(x[-1]), learning_rate=1e-4)
    before = [p.clone() for p in model.parameters()]
    exec(readme_block("for pairs in batches"), scope)
    assert scope["losses"].shape == (4,) and [len(seen), seen[0]] == [2, pytest.approx(expected, rel=1e-5)]
    assert any((a != b).any() for a, b in zip(before, model.parameters()))


def test_the_trl_subclass_of_the_readme(runs, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    exec(readme_block("class TDPOTrainer"), scope := {})
    ref, tokenizer = sample.load_model(runs["sft"])
    rows = Dataset.from_list([json.loads(line) for line in open(runs["pairs"])])
    args = trl.DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, use_cpu=True, bf16=False, report_to=[], max_length=64, save_strategy="no")
    trainer = scope["TDPOTrainer"](model=runs["tdpo2"], ref_model=ref, args=args, train_dataset=rows, processing_class=tokenizer)      # a path: TRL loads what we saved
    batch, examples = next(iter(trainer.get_train_dataloader())), []
    parts = [(ids[mask == 0], ids[mask == 1]) for ids, mask in ((i[a == 1], c[a == 1]) for i, c, a in zip(*(batch[k] for k in ("input_ids", "completion_mask", "attention_mask"))))]
    examples = [(p.tolist(), w.tolist(), l.tolist()) for (p, w), (_, l) in zip(parts[:8], parts[8:])]
    with torch.no_grad():
        assert trainer._compute_loss(trainer.model, batch, False).item() == pytest.approx(own_loss(sample.load_model(runs["tdpo2"])[0], ref, examples), rel=1e-5)
    assert len(examples) == 8 and math.isfinite(trainer.train().training_loss)


def test_a_checkpoint_loads_in_the_evaluation_harness(runs):
    pytest.importorskip("lm_eval.models.huggingface")
    model, tokenizer = sample.load_model(runs["tdpo2"])
    printed = []
    exec(readme_block("HFLM").replace("out/reviews-tdpo2", runs["tdpo2"]), dict(print=printed.append))
    (((score, _),),) = printed
    prompt, response = (tokenizer(x, return_tensors="pt")["input_ids"] for x in ("the plot", " was dull and the music"))
    with torch.no_grad():
        logps = model(torch.cat([prompt, response], 1)).logits.log_softmax(-1)[0, prompt.shape[1] - 1:-1]
    assert score == pytest.approx(logps.gather(1, response[0][:, None]).sum().item(), rel=1e-4)


def test_resume_continues_bit_for_bit(runs):
    whole, parts = train_on_pairs(runs, "whole", "--max_steps=20", "--eval_interval=5"), train_on_pairs(runs, "parts", "--max_steps=10", "--eval_interval=5")
    code, out = script("train.py", "--resume=True", f"--out_dir={parts}", "--max_steps=20")
    assert code == 0, out
    assert open(whole + "/model.safetensors", "rb").read() == open(parts + "/model.safetensors", "rb").read()
    same_run(whole, parts)


# ---------------------------------------------------------------------------------------------------------------------
# several processes, signals, kills


def same_run(a, b, exactly=True):
    """Two run directories hold the same weights, optimizer and log, timing aside."""
    logs = [[{k: v for k, v in x.items() if k not in ("pairs_per_s", "tokens_per_s", "peak_gib")} for x in log_of(f)] for f in (a, b)]
    states = [sample.load_state(f) for f in (a, b)]
    weights = [torch.cat([x.flatten() for x in sample.load_model(f)[0].parameters()]) for f in (a, b)]
    squares = [torch.cat([v.flatten() for k in states[0]["optimizer"]["state"] for v in s["optimizer"]["state"][k].values()]) for s in states]
    assert states[0]["step"] == states[1]["step"] and 10000 < len(weights[0]) < len(squares[0]) == len(squares[1])
    if exactly:
        assert logs[0] == logs[1] and torch.equal(*weights) and torch.equal(*squares)
    else:       # where gradients vanish, RMSprop magnifies their rounding
        assert all((x - y).norm() < limit * x.norm() for (x, y), limit in ((weights, 1e-5), (squares, 1e-5)))
        assert [list(x) for x in logs[0]] == [list(x) for x in logs[1]]
        for x, y in zip(*logs):
            assert x == pytest.approx(y, rel=2e-4, abs=2e-6)


def torchrun(n, *args, env={}):
    """train.py on n processes, in the background."""
    command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []), os.path.join(HERE, "train.py"), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **({"OMP_NUM_THREADS": "1"} if n > 1 else {}), **env})


def ended(process):
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def options_on_pairs(runs, out_dir, *args):
    return [f"--data={runs['pairs']}", f"--init_from={runs['sft']}", "--max_length=64", "--max_prompt_length=16", "--batch_size=8", "--warmup_steps=3", "--device=cpu",
            "--learning_rate=1e-4", "--save_interval=0", f"--out_dir={os.path.join(runs['folder'], out_dir)}", *args]


def test_one_two_and_three_processes_agree_and_resume_each_other(runs, words):
    """A tied model on 3 processes at once, on 2 and then on 1; an untied one with a bias on 1 and then on 2; SFT: each ends where one process ends
    that never stopped."""
    from transformers import PhiConfig
    untied = f"--init_from={runs['folder']}/untied"
    torch.manual_seed(0)
    phi = AutoModelForCausalLM.from_config(PhiConfig(**{**SIZES, "vocab_size": len(words)}, intermediate_size=48, eos_token_id=0))
    torch.nn.init.normal_(phi.lm_head.bias)
    phi.save_pretrained(untied[12:]), words.save_pretrained(untied[12:])
    long = ["--max_steps=10", "--eval_interval=5", "--batch_size=7"]
    for name, model, parts in (("tied", [], ((3, 10),)), ("tied", [], ((2, 5), (1, 10))), ("untied", [untied], ((1, 5), (2, 10))),
                               ("adamw", ["--method=sft", "--optimizer=adamw"], ((2, 5), (1, 10)))):
        whole = train_on_pairs(runs, f"{name}-whole", *long, *model, "--overwrite=True")
        for n, steps in parts:
            options = options_on_pairs(runs, f"{name}-parts", *long, *model, f"--max_steps={steps}", "--overwrite=True") if steps == parts[0][1] else \
                ["--resume=True", f"--out_dir={runs['folder']}/{name}-parts", f"--max_steps={steps}"]
            code, out = ended(torchrun(n, *options)) if n > 1 else script("train.py", *options)
            assert code == 0 and out.count("median speed") == 1, out
        same_run(whole, f"{runs['folder']}/{name}-parts", exactly=False)
        assert json.load(open(f"{runs['folder']}/{name}-parts/config.json"))["architectures"] == json.load(open(f"{whole}/config.json"))["architectures"]


def test_what_one_process_meets_ends_all_and_is_said_once(runs, tmp_path):
    for wrong, said in (("--alpha=-1", "--alpha=-1.0: it must be at least 0"), ("--alpha", "--alpha: expected one argument")):
        code, out = ended(torchrun(2, *options_on_pairs(runs, "many-bad", "--max_steps=2", wrong)))
        assert code and out.count(said) == 1, out
    code, out = ended(torchrun(2, *options_on_pairs(runs, "many-bad", "--max_steps=2", "--max_length=500")))
    assert code and out.count("more than the 128 positions") == 1 and f'File "{HERE}/train.py"' not in out, out
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('RANK') == '1':\n    import torch\n    def step(*_, **__): raise RuntimeError('boom on one')\n"
                                               "    torch.optim.RMSprop.step = step\n")
    code, out = ended(torchrun(2, *options_on_pairs(runs, "many-bad", "--max_steps=2"), env={"PYTHONPATH": str(tmp_path)}))
    assert code and out.count("RuntimeError: boom on one") == 1 and out.count(f'File "{HERE}/train.py", line') == 1, out         # torchrun adds a traceback of its own


def test_many_processes_meet_signals_and_faults_as_one_does(runs):
    """The sentiment task, compiled, on 2 processes: stopped by SIGTERM, continued to its end; then a save that fails, and a loss that is not finite."""
    folder = os.path.join(runs["folder"], "many-sentiment")
    process = torchrun(2, f"--init_from={runs['sft']}", f"--out_dir={folder}", "--max_steps=100000", "--train_prefixes=48", "--eval_prefixes=24", "--batch_size=8", "--compile=True",
                       "--eval_interval=0")
    wait_for(lambda: log_of_whole_lines(folder) >= 3, process, 300)
    process.send_signal(signal.SIGTERM)
    code, out = ended(process)
    step = sample.load_state(folder)["step"]
    assert code and out.count(f"stopped after step {step}, which is saved") == 1 and "compile True" in out and 'train.py", line' not in out, out
    code, out = ended(torchrun(2, "--resume=True", f"--out_dir={folder}", f"--max_steps={step + 2}"))
    last = log_of(folder)[-1]
    assert code == 0 and last["step"] == step + 2 == sample.load_state(folder)["step"] and last["eval_n"] == 24 and last["eval_sample_kl"] > 0, out
    code, out = ended(torchrun(2, "--resume=True", f"--out_dir={folder}", f"--max_steps={step + 4}", "--compile=False", env={"TDPO_TEST_FSIZE": "100000", "PYTHONPATH": small_files(runs)}))
    assert code and out.count(f"error: step {step + 4} could not be saved") == 1 and sample.load_state(folder)["step"] == step + 2 and sample.load_model(folder), out
    code, out = ended(torchrun(2, *options_on_pairs(runs, "many-nan", "--learning_rate=1e30", "--max_steps=5", "--warmup_steps=0")))
    assert code and len(re.findall(r"error: the loss \(nan\) .* of step 2 is not finite; pairs: \S+pairs.jsonl line \d+", out)) == 1, out


def small_files(runs):
    """A folder that, on PYTHONPATH, forbids files to grow beyond TDPO_TEST_FSIZE bytes: a full disk's stand-in."""
    os.makedirs(folder := os.path.join(runs["folder"], "small-files"), exist_ok=True)
    with open(folder + "/sitecustomize.py", "w") as f:
        f.write("import os, resource\nif 'TDPO_TEST_FSIZE' in os.environ:\n    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ['TDPO_TEST_FSIZE']),) * 2)\n")
    return folder


def wait_for(what, process, seconds=120):
    began = time.time()
    while not what():
        if process.poll() is not None or time.time() - began > seconds:
            process.kill()
            pytest.fail(process.communicate(timeout=20)[0])
        time.sleep(0.001)


def test_signals_finish_the_step_and_save(runs):
    whole, folder = train_on_pairs(runs, "signals-whole", "--max_steps=60"), os.path.join(runs["folder"], "signals")
    options, reached = options_on_pairs(runs, "signals", "--max_steps=60"), 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = torchrun(1, *options)
        wait_for(lambda: log_of_whole_lines(folder) >= reached + 3, process)
        code, out = script("train.py", "--resume=True", f"--out_dir={folder}")      # one directory, one run
        assert code == 1 and "another run is at work in it" in out
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        reached = sample.load_state(folder)["step"]
        assert process.returncode == 128 + number and f"stopped after step {reached}, which is saved | continue: python train.py --resume=True --out_dir={folder}" in out, out
        assert log_of(folder)[-1]["step"] == reached < 60
        options = ["--resume=True", f"--out_dir={folder}"]
    kept = eval_imdb.read_log(folder)
    with open(folder + "/log.jsonl", "a") as f:
        f.write('{"step": 99, "lo')
    assert kept == eval_imdb.read_log(folder) and kept[-1]["step"] == reached
    with open(folder + "/log.jsonl", "w") as f:
        f.writelines(json.dumps(x) + "\n" for x in kept)
    with open(folder + "/log.jsonl", "a") as f:             # what a kill leaves: steps after the last save, and a line that was cut
        f.write(json.dumps({"step": reached + 1, "loss": 9}) + '\n{"step": 99, "lo')
    code, out = script("train.py", *options)
    assert code == 0, out
    same_run(whole, folder)


def test_signals_save_nothing_broken_and_leave_nobody_behind(runs, tmp_path):
    process = torchrun(1, *options_on_pairs(runs, "signals3", "--max_steps=3", "--batch_size=2000", "--learning_rate=1e38", "--warmup_steps=0"))
    wait_for(lambda: log_of_whole_lines(runs["folder"] + "/signals3") == 0, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    code, out = ended(process)
    assert code == 1 and "held-out loss after step 1 is nan" in out and not os.path.exists(runs["folder"] + "/signals3/model.safetensors"), out
    process, sft = torchrun(1, f"--out_dir={tmp_path}/a"), str(tmp_path / "reviews-sft-1-new")          # which trains its SFT model first
    wait_for(lambda: log_of_whole_lines(sft) >= 3, process)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 128 + signal.SIGTERM
    with open(sft + "/.lock", "w") as lock:
        time.sleep(1)
        __import__("fcntl").flock(lock, 6)                      # exclusive, without waiting: nobody is at work there


def test_a_second_signal_leaves_at_once(runs):
    process = torchrun(1, *options_on_pairs(runs, "signals2", "--max_steps=3", "--batch_size=20000", "--log_interval=1"))
    caught = lambda: int(re.search(r"SigCgt:\s+(\w+)", open(f"/proc/{process.pid}/status").read())[1], 16) >> signal.SIGTERM - 1 & 1
    wait_for(caught, process)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: not caught(), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM and not os.path.exists(runs["folder"] + "/signals2/model.safetensors")


def test_kills_leave_the_last_save(runs):
    """SIGKILL at random moments of a run that saves at every step; TDPO_KILLS=20 for twenty of them."""
    folder, rng, options, step, lost = os.path.join(runs["folder"], "kills"), np.random.default_rng(), options_on_pairs(runs, "kills", "--max_steps=100000", "--log_interval=1000"), 0, 0
    options = [*options, "--save_interval=1", "--eval_pairs=2"]
    state = lambda: next(iter(sample.glob.glob(folder + "/training_state-*.pt")), None)
    for n in range(int(os.environ.get("TDPO_KILLS", 3))):
        process, before = torchrun(1, *options), state()
        wait_for(lambda: state() != before, process)
        time.sleep(rng.uniform(0, 0.5))
        if n % 2 == 0:                          # every other kill falls into a save, or just behind it
            wait_for(lambda: os.path.exists(folder + "/.saving"), process)
            time.sleep(rng.uniform(0, 0.02))
        logged = log_of_whole_lines(folder)
        process.kill()
        process.communicate()
        model, _ = sample.load_model(folder)
        new = sample.load_state(folder)["step"]
        assert new >= max(step, logged - 2) and all(torch.isfinite(p).all() for p in model.parameters())
        assert AutoModelForCausalLM.from_pretrained(folder) and log_of_whole_lines(folder) >= new
        lost += os.path.exists(folder + "/.saving")
        step, options = new, ["--resume=True", f"--out_dir={folder}"]
    print(f"{lost} kills fell into a save")


def log_of_whole_lines(folder):
    return max((x["step"] for x in eval_imdb.read_log(folder)), default=-1)


def test_a_save_that_fails_keeps_the_one_before(runs):
    """Files that may not grow beyond 100 kB stand for a full disk."""
    folder = train_on_pairs(runs, "full", "--max_steps=2")
    code, out = ended(torchrun(1, "--resume=True", f"--out_dir={folder}", "--max_steps=4", env={"TDPO_TEST_FSIZE": "100000", "PYTHONPATH": small_files(runs)}))
    assert code == 1 and re.search("error: step 4 could not be saved in .*/full: .*What was saved there before is whole", out), out
    assert sample.load_state(folder)["step"] == 2 and not os.path.exists(folder + "/.saving") and sample.load_model(folder)


def test_memory_is_flat_over_500_steps(runs):
    """The embedded task: the resident memory of its process in steps 401 to 500 against steps 51 to 150."""
    folder, resident = os.path.join(runs["folder"], "flat"), [[] for _ in range(502)]
    process = torchrun(1, f"--init_from={runs['sft']}", f"--out_dir={folder}", "--max_steps=500", "--train_prefixes=96", "--eval_prefixes=32", "--batch_size=8", "--log_interval=500")
    while process.poll() is None:
        try:
            resident[log_of_whole_lines(folder) + 1].append(int(open(f"/proc/{process.pid}/statm").read().split()[1]))
        except (OSError, IndexError):           # before it has a log, and when it has gone
            pass
        time.sleep(0.02)
    code, out = ended(process)
    early, late = (np.median(sum(resident[a:b], [])) for a, b in ((52, 152), (402, 501)))
    assert code == 0 and late < 1.02 * early, (out, early, late)


def test_a_directory_that_cannot_be_written_is_said(runs, tmp_path):
    folder = "/proc/out"                        # not even root makes directories there
    if os.geteuid():
        os.mkdir(tmp_path / "only", 0o555)
        folder = str(tmp_path / "only" / "out")
    for name, *args in (("train.py",), ("eval_imdb.py", f"--runs={runs['tdpo2']}"), ("sample.py", f"--model={runs['tdpo2']}", "--num_prompts=1")):
        code, out = script(name, *args, f"--out_dir={folder}" if name == "train.py" else f"--out={folder}/x", fresh=True)
        assert code in (1, 2) and re.search(f"error: .*{folder}.*(written|No such file)", out) and "Traceback" not in out, out


def test_uncaught_errors_say_what_helps(capfd, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    sample.join_processes("out/x")
    for error, said in ((torch.OutOfMemoryError("CUDA out of memory. Tried"), "--micro_tokens"), (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "--micro_tokens"),
                        (OSError(28, "No space left on device", "out/x/log.jsonl"), "No space left on device: 'out/x/log.jsonl'. If out/x has a checkpoint, it is whole")):
        sys.excepthook(type(error), error, None)
        assert said in capfd.readouterr().err.splitlines()[-1]


def test_warnings_about_rounded_weights(runs, monkeypatch):
    model, tokenizer = sample.load_model(runs["sft"])
    low = os.path.join(runs["folder"], "low")
    model.to(torch.bfloat16).save_pretrained(low), tokenizer.save_pretrained(low)
    code, out = script("train.py", *options_on_pairs(runs, "rounded-ref", "--max_steps=1", f"--ref_from={low}"))
    assert code == 0 and re.search(r"warning: before the first step the KL from \S+low is \S+ nats, not 0", out), out
    load = sample.load_model
    monkeypatch.setattr(sample, "load_model", lambda *x, **y: (load(*x, **y)[0].to(torch.bfloat16), tokenizer))       # as one would edit it
    code, out = script("train.py", *options_on_pairs(runs, "rounded", "--max_steps=1", "--learning_rate=5e-6"))
    assert "warning: weights in torch.bfloat16 round updates of 5e-06 away" in out, out


def test_damaged_checkpoints_and_changed_data_are_refused(runs, tmp_path):
    import pickle
    import shutil
    good = train_on_pairs(runs, "to-damage", "--max_steps=2")

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    def cut(folder, state):
        os.truncate(folder / "model.safetensors", 1000)
    damages = {
        "no complete checkpoint": [lambda f, s: os.truncate(s, 100), lambda f, s: s.write_bytes(pickle.dumps(Evil())), lambda f, s: torch.save({"step": 1}, s), lambda f, s: s.unlink(), cut,
                                   lambda f, s: s.write_text("")],
        "another version's": [lambda f, s, x=x: (f / "options.json").write_text(json.dumps({k: v for k, v in {**json.load(open(f / "options.json")), **x}.items() if v != ""}))
                              for x in ({"gamma": 1}, {"beta": "x"}, {"alpha": None}, {"beta": ""})],
        "cannot be read": [lambda f, s, x=x: (f / "options.json").write_text(x) for x in ("{", "3", "")],
    }

    def state(folder, path, **change):
        torch.save({**torch.load(path), **change}, path)
    damages["damaged"] = [lambda f, s, x=x: state(f, s, **x) for x in ({"step": "x"}, {"step": -5}, {"rng": torch.zeros(3)}, {"optimizer": {}}, {"optimizer": {"state": {}}})]
    damages["damaged"] += [lambda f, s: (f / "config.json").write_text((f / "config.json").read_text().replace('"n_layer": 2', '"n_layer": 1'))]
    for message, ways in damages.items():
        for n, way in enumerate(ways):
            folder = tmp_path / f"{message[:3]}{n}"
            shutil.copytree(good, folder)
            way(folder, next(folder.glob("training_state-*.pt")))
            before = {p.name: p.read_bytes() for p in folder.iterdir()}
            code, out = script("train.py", "--resume=True", f"--out_dir={folder}", "--max_steps=4")
            assert code and message in out and "Traceback" not in out, (message, n, out)
            assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert not (tmp_path / "ran").exists()
    for n, line in enumerate(("3", '{"eval_loss": 1}', '{"step": "x"}', "null")):       # a log is cut at what is no record
        shutil.copytree(good, folder := tmp_path / f"log{n}")
        (folder / "log.jsonl").write_text((folder / "log.jsonl").read_text() + line + "\n")
        code, out = script("train.py", "--resume=True", f"--out_dir={folder}", "--max_steps=3")
        assert code == 0 and [x["step"] for x in log_of(folder) if "loss" in x] == [1, 2, 3], out
    changed = dict(runs, pairs=str(tmp_path / "changed.jsonl"))
    lines = open(runs["pairs"]).read()
    open(changed["pairs"], "w").write(lines)
    folder = train_on_pairs(changed, "changed", "--max_steps=2")
    open(changed["pairs"], "w").write(lines.replace(" the ", " a ", 1))
    code, out = script("train.py", "--resume=True", f"--out_dir={folder}", "--max_steps=4")
    assert code == 1 and "the data or the reference" in out, out


@pytest.mark.parametrize("method", ("tdpo2", "sft"))
def test_micro_batches_change_no_number(runs, method):
    a, b = (log_of(train_on_pairs(runs, f"micro{n}{method}", f"--method={method}", "--max_steps=3", f"--micro_tokens={n}")) for n in (1, 100000))
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for name in set(x) - {"pairs_per_s", "tokens_per_s", "peak_gib"}:
            assert x[name] == pytest.approx(y[name], rel=2e-4, abs=2e-6), name


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_the_model_is_compiled_once(runs, tmp_path):
    """12 steps over pairs of many lengths need three graphs: the policy with and without a gradient, the reference. The losses are the uncompiled run's."""
    rng, rows = __import__("random").Random(0), [json.loads(line) for line in open(runs["pairs"])]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({k: "".join(re.findall(r" *\S+", v)[:rng.randint(3, 20)]) for k, v in row.items()}) + "\n" for row in rows))
    torch._dynamo.reset()
    before, options = torch._dynamo.utils.counters["stats"]["unique_graphs"], [f"--data={path}", "--max_steps=12", "--micro_tokens=128"]
    compiled = log_of(train_on_pairs(runs, "compiled", "--compile=True", *options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 3
    plain = log_of(train_on_pairs(runs, "not-compiled", *options))
    assert [x["loss"] for x in compiled if "loss" in x] == pytest.approx([x["loss"] for x in plain if "loss" in x], rel=1e-4)


def test_every_method_trains_and_an_interrupted_save_leaves_the_last_one(runs, monkeypatch):
    for method in train.METHODS:
        folder = train_on_pairs(runs, "only-" + method, f"--method={method}", "--max_steps=6")
        losses = [x["eval_loss"] for x in log_of(folder) if "eval_loss" in x]
        assert losses[-1] < losses[0], method
    for stop_at in range(20):                            # interrupted before its 1st, 2nd, ... move, until it goes through
        before, step = open(folder + "/model.safetensors", "rb").read(), sample.load_state(folder)["step"]
        model, tokenizer = sample.load_model(folder)
        with torch.no_grad():
            next(model.parameters()).add_(1)
        moves, real = [], os.replace

        def fail(*args):
            moves.append(args)
            if len(moves) > stop_at:
                raise KeyboardInterrupt
            return real(*args)
        try:
            with monkeypatch.context() as m:
                m.setattr(os, "replace", fail)
                sample.save(folder, model, tokenizer, torch.optim.RMSprop(model.parameters()), 100 + stop_at)
        except KeyboardInterrupt:
            new = open(folder + "/model.safetensors", "rb").read() != before
            assert sample.load_state(folder)["step"] == (100 + stop_at if new else step)
            sample.load_model(folder)
        else:
            break
    assert 3 < stop_at < 19 and sample.load_state(folder)["step"] == 100 + stop_at and sum(f.startswith("training_state") for f in os.listdir(folder)) == 1


def test_all_file_formats_hold_the_same_pairs(runs, words, tmp_path):
    import datasets
    rows = [json.loads(line) for line in open(runs["pairs"])]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "p.parquet"), table.to_csv(tmp_path / "p.csv"), json.dump(rows, open(tmp_path / "p.json", "w"))
    expected = [p[1:] for p in sample.read_pairs(runs["pairs"], words)]
    for kind in ("parquet", "csv", "json"):
        assert [p[1:] for p in sample.read_pairs(str(tmp_path / f"p.{kind}"), words)] == expected, kind


# ---------------------------------------------------------------------------------------------------------------------
# bad input: one or two sentences, a non-zero exit, nothing written


OPTIONS = [     # (options, what the message says); exit code 2, before anything heavy is imported
    ("--alpha", "--alpha: expected one argument"),
    ("--methd=dpo", "unknown option --methd.*did you mean --method"), ("--method=tpdo2", "sft, dpo, fdpo, tdpo1, tdpo2; did you mean tdpo2"),
    ("--data=imbd", "imdb.*did you mean imdb"), ("--data=no.jsonl --init_from=x", "no.jsonl: no such file"), ("--device=gpu", "auto, cuda, mps, cpu"),
    ("--method=dpo --alpha=0.5", "--alpha would be ignored.*tdpo2"), ("--alpha=-1", "--alpha=-1.0: it must be at least 0"), ("--beta=0", "--beta=0.0.*greater than 0"),
    ("--beta=nan", "--beta=nan: expected a number"), ("--batch_size=0", "at least 1"), ("--batch_size=1.5", "a whole number"), ("--resume=maybe", "True or False"),
    ("--max_length=8 --max_prompt_length=8", "leaves no room"), ("--truncation=middle", "left, right"), ("--optimizer=adam", "rmsprop, adamw"),
    ("--data=a/b", "needs a model"), ("--method=sft --reward=exact", "--reward would be ignored"), ("--data=a/b --init_from=scratch", "scratch is the tiny"),
    ("--init_from=./nowhere", "--init_from=./nowhere: no such"), ("--reward=out/no", "--reward=out/no: no such"),
    ("--resume=True --out_dir=nowhere", "nowhere holds no run"), ("--wandb_log=True", "pip install wandb"),
]


@pytest.mark.parametrize("options, message", OPTIONS)
def test_option_errors(options, message, capsys):
    if "wandb" in options and __import__("importlib.util").util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(SystemExit) as stop:
        train.configure(options.split())
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_option_errors_come_together_and_before_heavy_imports():
    code = "import sys; sys.argv = ['train.py', '--alpha=-1', '--methd=x', '--beta=x']\nimport runpy\ntry: runpy.run_path('train.py', run_name='__main__')\n" \
           "except SystemExit as e: print(e.code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert done.stdout.split() == ["2", "False", "False"] and done.stderr.count("error:") == 3
    done = subprocess.run([sys.executable, "train.py", "--help"], capture_output=True, text=True, cwd=HERE)
    names = "method alpha beta data eval_data texts reward init_from ref_from out_dir resume overwrite max_steps batch_size learning_rate warmup_steps optimizer grad_clip max_length " \
            "max_prompt_length truncation completions min_score_gap eval_interval log_interval save_interval seed device dtype compile strict wandb_log"
    assert done.returncode == 0 and all(f"--{name} " in done.stdout for name in names.split())


GOOD = '{"prompt": "the plot", "chosen": " was warm", "rejected": " was dull"}'
FILES = [       # (content of pairs.jsonl, further options, what the message says)
    ("", "", "pairs.jsonl is empty"), ("\n\n", "", "has no rows"), (GOOD + "\n{broken", "", "line 2 is broken JSON"), ("[1]", "", "line 1 is not a JSON object"),
    ('{"prompt": "a", "chosen": "b"}', "", "line 1 has no 'rejected'; its columns are prompt, chosen"), ('{"chosen": "b", "rejected": "c"}', "", "has no 'prompt'"),
    (GOOD + "\n" + GOOD.replace(" was dull", ""), "", "line 2 has an empty 'rejected'"), (GOOD.replace("dull", "warm"), "", "line 1 has identical responses"),
    (GOOD.replace('" was dull"', "3"), "", "int in 'rejected' where text belongs"), (GOOD.replace("dull", "\\ud800"), "", "half a surrogate pair"),
    (b'{"prompt": "a", "chosen": "\xff", "rejected": "c"}', "", "line 1 is not UTF-8 text"), (GOOD + "\n" + GOOD.replace("plot", "music"), "--max_length=2 --max_prompt_length=1", "no two responses differ"), (GOOD, "", "all pairs share one prompt"),
    (GOOD.replace('"the plot"', '[{"role": "user", "content": "x"}]').replace('" was warm"', '[{"role": "assistant", "content": "x"}]').replace('" was dull"', '[{"role": "assistant", "content": "y"}]'),
     "", "no chat template"),
    (GOOD, "--max_length=500", "--max_length=500 is more than the 128 positions"), (GOOD, "--init_from=nobody/nothing --max_length=64", "hub could not be reached.*scratch"),
(GOOD, "--init_from=NO_WEIGHTS", "no weights"), (GOOD, "--init_from=NO_TOKENIZER", "no a? ?tokenizer"),
    (GOOD, "--init_from=TRUNCATED", "cannot load"), (GOOD, "--ref_from=OTHER_VOCABULARY", "another vocabulary"), (GOOD, "--init_from=MORE_TOKENS", "has ids up to 162, its model knows 61"), (GOOD, "--eval_data=nobody/nothing", "cannot read nobody/nothing.*Without a network"),
    ("\n".join([GOOD] * 300 + ["{"]), "--strict=True", "line 301 is broken JSON.*1 of 301"),
]


@pytest.fixture(scope="session")
def broken_models(runs):
    import shutil
    found = {}
    for name, drop in (("NO_WEIGHTS", "model.safetensors"), ("NO_TOKENIZER", "tokenizer"), ("TRUNCATED", None), ("OTHER_VOCABULARY", None), ("MORE_TOKENS", None)):
        found[name] = os.path.join(runs["folder"], name)
        shutil.copytree(runs["sft"], found[name])
        for file in os.listdir(found[name]):
            if drop and file.startswith(drop):
                os.remove(os.path.join(found[name], file))
    weights = found["TRUNCATED"] + "/model.safetensors"
    os.truncate(weights, os.path.getsize(weights) // 2)
    tiny("gpt2").save_pretrained(found["MORE_TOKENS"])          # than the model has embeddings
    with open(found["OTHER_VOCABULARY"] + "/tokenizer.json", "r+") as f:
        text = f.read().replace('"acting"', '"singing"')
        f.seek(0), f.write(text)
    return found


@pytest.mark.parametrize("content, options, message", FILES)
def test_bad_files_and_models(runs, broken_models, tmp_path, content, options, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, folder in broken_models.items():
        options = options.replace(name, folder)
    base = [f"--data={path}", f"--out_dir={tmp_path}/out"] + [o for o in (f"--init_from={runs['sft']}", "--max_length=64", "--max_prompt_length=16") if o.split("=")[0] not in options]
    code, out = script("train.py", *base, *options.split())
    last = out.strip().splitlines()[-1]
    assert code == 1 and last.startswith("error: ") and re.search(message, last), out
    assert "Traceback" not in out and len(re.findall(r"[.;] [A-Z]", last)) <= 3 and os.listdir(tmp_path / "out") == [".lock"]


def test_fuzzed_options_and_files_never_end_in_a_traceback(runs, words, tmp_path, monkeypatch):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st
    monkeypatch.chdir(tmp_path)
    examples = int(os.environ.get("TDPO_FUZZ", 0))          # 0: a fixed 150; more looks for new ones
    settings = hypothesis.settings(max_examples=examples or 150, derandomize=not examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
    names = st.sampled_from(sorted(train.configure(["--out_dir=out/x"]))) | st.text(max_size=6)
    values = st.sampled_from(["", "0", "-1", "1e400", "nan", "True", "dpo", "hh", "a/b", ".", "/", runs["pairs"], "\0"]) | st.text(max_size=8) | st.integers().map(str)

    @settings
    @hypothesis.given(st.lists(st.builds("--{}={}".format, names, values) | st.text(max_size=8), max_size=5))
    def options(argv):
        try:
            assert set(train.configure(argv)) >= {"method", "out_dir"}
        except SystemExit as stop:
            assert stop.code in (0, 2)          # 0 is --help

    texts = st.text() | st.sampled_from(["\ud800", "\0\x1b[2J", "", " ", "é" * 9])
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
    messages = st.lists(st.dictionaries(st.sampled_from(["role", "content"]), scalars | st.just("user")), max_size=2)
    anything = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(texts, x, max_size=3), max_leaves=6)
    rows = st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected"]), scalars | messages | anything) | anything
    lines = rows.map(lambda x: json.dumps(x).encode()) | st.binary(max_size=30) | st.just(GOOD.encode())

    @settings
    @hypothesis.given(st.lists(lines, max_size=5))
    def files(content):
        path = tmp_path / "fuzz.jsonl"
        path.write_bytes(b"\n".join(content))
        for template in (None, "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"):
            words.chat_template = template
            try:
                pairs = sample.read_pairs(str(path), words)
                sample.tokenize(pairs, words, 16, 4, "left")
            except SystemExit as stop:
                assert isinstance(stop.code, str) and stop.code.startswith("error: ")
    words.chat_template = None
    good = [GOOD.replace("plot", f"plot {n}") for n in range(200)]
    run = dict(method="dpo", data=str(tmp_path / "fuzz.jsonl"), eval_data="", eval_pairs=50, max_length=16, max_prompt_length=4, truncation="left", strict=False, seed=1, init_from="x")

    @hypothesis.settings(settings, max_examples=(examples or 150) // 5)
    @hypothesis.given(lines)
    def one_of_many(line):                      # which is left out, or trained on, or held out
        (tmp_path / "fuzz.jsonl").write_bytes(b"\n".join([*(x.encode() for x in good), line.replace(b"\n", b" ")]))
        found = eval_imdb.training_data(run, tiny("gpt2"), words, None, "float32")
        assert 200 <= len(found[0]) + len(found[1]) + found[5] <= 201 and len(found[1]) == 20
    options()
    files()
    words.chat_template = None
    one_of_many()


def test_odd_texts_survive(words, tmp_path):
    """Control characters, long lines and beginnings cut inside a character, in a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({"<eos>": 0, **{c: n + 1 for n, c in enumerate(letters)}}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    odd = "\0\x1b[31m\u202e\t😀é" * 3
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(dict(prompt=p, chosen=odd, rejected=r)) + "\n" for p, r in (("", "a"), (odd, "b"), ("x" * 3_000_000, "c" * 3_000_000))))
    (empty, *_), _, (cut, w, _) = sample.tokenize(sample.read_pairs(str(path), tokenizer), tokenizer, 64, 16, "left")[0]
    assert empty == [0] and len(cut) == 16 and odd.startswith(tokenizer.decode(w).rstrip("\ufffd"))
    prompt, response = tokenizer("😀")["input_ids"][:2], tokenizer("😀é")["input_ids"][2:]            # the prompt is half a character
    assert eval_imdb.response_text(tokenizer, prompt, response).endswith("é")
    prefixes = eval_imdb.task_prefixes(dict(seed=1, train_prefixes=40, eval_prefixes=40), tokenizer, {"train": ["😀" * 9] * 40, "test": ["😀" * 9] * 40})
    assert all("\ufffd" not in x and x for x in prefixes["train"] + prefixes["test"])


def test_no_remote_code_runs(runs, tmp_path, monkeypatch):
    import io
    import shutil
    folder = tmp_path / "model"
    shutil.copytree(runs["sft"], folder)
    config = json.load(open(folder / "config.json"))
    json.dump({**config, "model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}, open(folder / "config.json", "w"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    with pytest.raises(SystemExit, match="cannot load"):
        sample.load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_single_bad_rows_are_counted(runs, words, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([GOOD] * 300 + ["{"] + [GOOD] * 10))
    assert len(sample.read_pairs(str(path), words)) == 310
    assert re.search(r"left out 1 bad rows of 311 .*line 301 is broken JSON", capsys.readouterr().out)


def test_a_run_is_not_overwritten_and_a_non_finite_loss_stops(runs):
    before = {f: os.path.getmtime(os.path.join(runs["tdpo2"], f)) for f in os.listdir(runs["tdpo2"])}
    code, out = script("train.py", f"--data={runs['pairs']}", f"--init_from={runs['sft']}", f"--out_dir={runs['tdpo2']}")
    assert code == 2 and "holds another run" in out and "--overwrite=True" in out
    code, out = script("train.py", f"--init_from={runs['sft']}", f"--out_dir={runs['sft']}", "--overwrite=True")
    assert code == 2 and "is a model that the run starts from" in out
    assert before == {f: os.path.getmtime(os.path.join(runs["tdpo2"], f)) for f in os.listdir(runs["tdpo2"])}
    code, out = script("train.py", f"--data={runs['pairs']}", f"--init_from={runs['sft']}", "--max_length=64", "--max_prompt_length=16", "--learning_rate=1e30", "--max_steps=5",
                       "--warmup_steps=0", "--batch_size=4", f"--out_dir={runs['folder']}/nan")
    assert code == 1 and re.search(r"error: the loss \(nan\) .* of step 2 is not finite; pairs: \S+pairs.jsonl line \d+", out), out
    assert not os.path.exists(f"{runs['folder']}/nan/model.safetensors")
    code, out = script("train.py", f"--data={runs['pairs']}", f"--init_from={runs['sft']}", "--max_length=64", "--max_prompt_length=16", "--learning_rate=1e30", "--max_steps=1",
                       "--warmup_steps=0", "--batch_size=4", f"--out_dir={runs['folder']}/nan", "--overwrite=True")
    assert code == 1 and "held-out loss after step 1 is nan" in out and not os.path.exists(f"{runs['folder']}/nan/model.safetensors")
    code, out = script("sample.py", f"--model={runs['sft']}", "--prompt=" + "the " * 200)
    assert code == 1 and "a prompt of 200 tokens leaves no room" in out


def test_readme_names_options_that_exist():
    readme = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
    source = "".join(open(os.path.join(HERE, f), encoding="utf-8").read() for f in ("sample.py", "eval_imdb.py", "test_tdpo.py"))
    others = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "judge", "mode", "baseline", "model_outputs", "reference_outputs"}     # torchrun's and the judges'
    known = set(train.configure(["--out_dir=out/x"])) | set(re.findall(r'add_argument\("--(\w+)"', source)) | {"help"} | others
    named = set(re.findall(r"--(\w+)", readme))
    assert named <= known and len(named) > 15, named - known
    assert len(readme.splitlines()) <= 250
    assert len(open(os.path.join(HERE, "tdpo.py")).readlines()) < 200


# ---------------------------------------------------------------------------------------------------------------------
# python test_tdpo.py: time, memory and error of the loss layer, forward and backward under bf16 autocast, each form in a process of its own;
# python test_tdpo.py steps --init_from=DIR --data=FILE --batch_size=8 ...: whole steps of train.py, with each of its economies off in turn


def bench_case(N, V, d, device):
    """N response tokens in pairs of 2 x 64, fp32 weights, a policy a little off its reference."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, token = torch.randn(N, d, generator=g), torch.randn(V, d, generator=g) * 2 / d**0.5, torch.arange(N)
    ref_hidden, labels = hidden + 0.05 * torch.randn(N, d, generator=g), torch.randint(0, V, (N,), generator=g)
    case = [x.to(device) for x in (hidden, weight, ref_hidden, weight, labels)]
    return [case[0].requires_grad_(), case[1].clone().requires_grad_(), *case[2:], token // 128, token % 128 < 64]


def by_sequence(tokens, pair, chosen):
    """Per-token values to (chosen, rejected) sums, each (P,)."""
    slot = (2 * pair + ~chosen).to(tokens.device)
    return tokens.new_zeros(2 * int(pair[-1]) + 2).index_add(0, slot, tokens).view(-1, 2).unbind(1)


def bench_listing(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen):
    """The paper's Appendix B, mended: every tensor of N x V whole, sums over sequences, the stop-gradient of Eq. 18."""
    logps, ref_logps = (hidden @ weight.T).float().log_softmax(-1), (ref_hidden @ ref_weight.T).float().log_softmax(-1)
    kl_w, kl_l = by_sequence((ref_logps.exp() * (ref_logps - logps)).sum(-1), pair, chosen)
    ratio_w, ratio_l = by_sequence((logps - ref_logps).gather(1, labels[:, None])[:, 0], pair, chosen)
    return -torch.nn.functional.logsigmoid(0.1 * (ratio_w - ratio_l - 0.5 * (kl_l - kl_w.detach()))).mean(), kl_l


def bench_unfused(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen):
    logratio, kl, _ = tdpo.token_stats(hidden @ weight.T, ref_hidden @ ref_weight.T, labels)
    (ratio_w, ratio_l), (kl_w, kl_l) = by_sequence(logratio, pair, chosen), by_sequence(kl, pair, chosen)
    return tdpo.preference_loss("tdpo2", ratio_w, ratio_l, kl_w, kl_l).mean(), kl_l


def bench_fused(*case):
    loss, stats = tdpo.fused_tdpo_loss(*case)
    return loss, stats["kl_l"]


def bench_products(hidden, weight, ref_hidden, ref_weight, *_):
    """The floor: the fused form's four products alone, in its chunks and dtypes."""
    cuda = hidden.is_cuda
    rows = tdpo.CHUNK_ROWS if cuda else tdpo.CHUNK_ROWS // 8
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), torch.backends.mkldnn.flags(None, None, None, "bf16"):
        low, h_low, r_low = weight.bfloat16(), hidden.bfloat16(), ref_hidden.bfloat16()
        w, h, r = (low, h_low, r_low) if cuda else (weight, hidden, ref_hidden)
        d_weight = torch.zeros_like(weight)
        some = tdpo._product(h[:rows], w.T, torch.float32).bfloat16()
        for part, ref_part, low_part in zip(h.split(rows), r.split(rows), h_low.split(rows)):
            dz = some[:len(part)]
            tdpo._product(part, w.T, torch.float32)
            tdpo._product(ref_part, w.T, torch.float32)
            dz @ low
            d_weight += tdpo._product(dz.T, low_part, torch.float32)


def memory(device, reset=False):
    """Peak memory in GiB since the last reset; a reset returns what is held now. On Linux the kernel keeps a process's peak and can reset it."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30
    if reset:
        open("/proc/self/clear_refs", "w").write("5")
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 2**20


def bench_one(form, N, V, d):
    """{"seconds", "gib", "kl_error", "grad_error"}: the median of 3 runs after a warm-up, extra peak memory, and errors against float64."""
    device, times, result = sample.DEVICES[0], [], None
    run, case = globals()["bench_" + form], bench_case(N, V, d, device)

    def once(case):
        with torch.autocast(device, torch.bfloat16):
            result = run(*case)
        grads = torch.autograd.grad(result[0], case[:2]) if result else None
        if device == "cuda":
            torch.cuda.synchronize()
        return result, grads
    once([x[:256] if len(x) == N else x for x in case])         # compiles, so that compiling does not count as memory
    before = memory(device, reset=True)
    for _ in range(4):
        result = grads = None
        began = time.perf_counter()
        result, grads = once(case)
        times.append(time.perf_counter() - began)
    report = dict(seconds=float(np.median(times[1:])), gib=memory(device) - before, kl_error=None, grad_error=None)
    if result:
        exact = [x.detach().double() if x.is_floating_point() else x for x in case]
        exact[0].requires_grad_()
        loss, stats = tdpo.fused_tdpo_loss(*exact)              # in float64; it equals the slow loop in the tests
        (expected,) = torch.autograd.grad(loss, exact[0])
        report.update(kl_error=((result[1] - stats["kl_l"]).abs() / stats["kl_l"]).max().item(), grad_error=((grads[0] - expected).norm() / expected.norm()).item())
    return report


def without(part, argv):
    """Run train.py with one economy off; its log tells the speed."""
    collate = sample.collate

    def padded(examples, indices, length, *rest):               # every pair as long as the longest of its pass
        sizes = [sample.size(examples[i]) for i in indices]
        length = length and -(-len(indices) * max(sizes) // 1024) * 1024
        longer = [(p, w, l + [0] * (max(sizes) - n)) for (p, w, l), n in zip((examples[i] for i in indices), sizes)]
        batch = collate(longer, range(len(longer)), length, *rest)
        real = torch.cat([torch.arange(len(w) + len(l)) < len(w) + len(examples[i][2]) for i, (_, w, l) in zip(indices, longer)])
        return {name: x[real] if name in ("source", "labels", "pair", "chosen") else x for name, x in batch.items()}

    def twice(examples, indices, length, *rest):                # a prompt for the chosen and a prompt for the rejected response
        halves = [half for i in indices for half in ((examples[i][0], examples[i][1], []), (examples[i][0], [], examples[i][2]))]
        length = length and -(-sum(map(sample.size, halves)) // 1024) * 1024
        batch = collate(halves, range(len(halves)), length, *rest)
        return {**batch, "pair": batch["pair"] // 2}

    def unfused(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen, beta, alpha, method):
        logratio, kl, rkl = tdpo.token_stats(hidden @ weight.T, ref_hidden @ ref_weight.T, labels)
        (ratio_w, ratio_l), (kl_w, kl_l), (rkl_w, rkl_l) = (by_sequence(x, pair, chosen) for x in (logratio, kl, rkl))
        losses = tdpo.preference_loss(method, ratio_w, ratio_l, kl_w, kl_l, beta, alpha)
        return losses.mean(), {name: x.detach() for name, x in zip(tdpo.STATS, (losses, ratio_w, ratio_l, kl_w, kl_l, rkl_w, rkl_l))}
    if part == "packing":
        sample.collate = padded
    elif part == "sharing":
        sample.collate = twice
    elif part == "fused loss":
        tdpo.fused_tdpo_loss = unfused
    sys.argv = ["train.py", *argv]
    runpy.run_path(os.path.join(HERE, "train.py"), run_name="__main__")


def bench_steps(argv):
    """A table of pairs/s (pairs over time, without the first pass over them, which warms up) and peak memory."""
    import tempfile
    options = train.configure([*argv, "--out_dir=out/x"])
    n = 3 * sum(1 for _ in open(options["data"])) // options["batch_size"]
    print("| off | pairs/s | peak GiB | loss of step 1 |\n|---|---|---|---|")
    for part in ("nothing", "packing", "sharing", "fused loss", "compile"):
        with tempfile.TemporaryDirectory() as folder:
            compile = (sample.DEVICES[0] == "cuda") != (part == "compile")
            command = [*argv, f"--out_dir={folder}/run", f"--max_steps={n}", "--eval_interval=0", "--save_interval=0", f"--compile={compile}"]
            done = subprocess.run([sys.executable, __file__, "without", part, *command], capture_output=True, text=True)
            log = [x for x in log_of(f"{folder}/run") if "loss" in x] if done.returncode == 0 else []
        timed = log[n // 3:]
        part = ("compile off" if sample.DEVICES[0] == "cuda" else "nothing, compile on") if part == "compile" else part
        print(f"| {part} | {len(timed) / sum(1 / x['pairs_per_s'] for x in timed):.2f} | {log[-1]['peak_gib']:.2f} | {log[0]['loss']:.5f} |" if log else
              f"| {part} | {(done.stderr.strip().splitlines() or ['killed: out of memory'])[-1][:100]} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] in (["without"], ["steps"]):
        without(sys.argv[2], sys.argv[3:]) if sys.argv[1] == "without" else bench_steps(sys.argv[2:])
        sys.exit()
    if len(sys.argv) > 1:
        print(json.dumps(bench_one(sys.argv[1], *map(int, sys.argv[2:]))))
        sys.exit()
    cuda = torch.cuda.is_available()
    print(f"the loss layer, forward and backward, bf16 autocast, {torch.cuda.get_device_name() if cuda else f'CPU with {torch.get_num_threads()} threads'}, torch {torch.__version__}\n"
          "median of 3 runs after a warm-up; TFLOP/s on 8 N V d; extra peak memory; largest relative error of a rejected KL, and the gradient's, against float64\n\n"
          "| N | V | d | form | s | x products | TFLOP/s | GiB | KL error | gradient error |\n|---|---|---|---|---|---|---|---|---|---|")
    for N, V, d in [(4096, 50257, 1280), (16384, 50257, 1280), (8192, 151936, 1024)] if cuda else [(1024, 50257, 768), (4096, 50257, 768)]:
        floor = None
        for form in ("products", "fused", "unfused", "listing"):
            done = subprocess.run([sys.executable, __file__, form, *map(str, (N, V, d))], capture_output=True, text=True)
            if done.returncode:
                print(f"| {N} | {V} | {d} | {form} | {(done.stderr.strip().splitlines() or ['killed: out of memory'])[-1][:80]} |", flush=True)
                continue
            r = json.loads(done.stdout.splitlines()[-1])
            floor = floor or r["seconds"]
            errors = " | ".join("" if r[x] is None else f"{r[x]:.1e}" for x in ("kl_error", "grad_error"))
            print(f"| {N} | {V} | {d} | {form} | {r['seconds']:.3f} | {r['seconds'] / floor:.2f} | {8e-12 * N * V * d / r['seconds']:.2f} | {r['gib']:.2f} | {errors} |", flush=True)
