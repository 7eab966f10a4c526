"""Tests of the four programs: python -m pytest -q -n 2. They need no GPU and no network, and take less than three
minutes in two processes (-n 2, by pytest-xdist).

TDPO_KILLS=20 kills a run more often, TDPO_RUNS=100 starts more runs under torchrun, and TDPO_STEPS=500 watches the
memory of a run for longer.
"""
import argparse
import contextlib
import copy
import datetime
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing.connection
import os
import pathlib
import pickle
import pty
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
import types
import weakref
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=HERE)
# the tests' tensors are tiny
os.environ["OMP_NUM_THREADS"] = "1"

import train        # before torch, as it sets up the memory of the process
import numpy as np
import pytest
import torch
import transformers as hf
from pytest import approx
from torch.autograd import grad
from torch.nn.attention import flex_attention as flex
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import flex_attention as integration

import eval_imdb
import sample
import tdpo

BETA, ALPHA = 0.3, 0.7
METHODS = ("dpo", "fdpo", "tdpo1", "tdpo2")
close = functools.partial(torch.allclose, rtol=1e-9, atol=1e-12)


def text_of(path):
    return pathlib.Path(HERE, path).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# losses and gradients against the slow loop: the equations in plain floats, one token and one vocabulary entry at a
# time. Any objective is one edit: those of README's table are applied to tdpo.py as they stand there


def slow_token(pi, ref, label):
    """What one response token adds to the sums, from two lists of V logits."""
    log_z = math.log(sum(math.exp(x) for x in pi))
    log_z_ref = math.log(sum(math.exp(x) for x in ref))
    p, q = [x - log_z for x in pi], [x - log_z_ref for x in ref]
    kl = sum(math.exp(b) * (b - a) for a, b in zip(p, q))
    rkl = sum(math.exp(a) * (a - b) for a, b in zip(p, q))
    return tdpo.Sums(p[label] - q[label], kl, rkl, p[label], 1)


def nls(x):
    """-log sigmoid(x)"""
    return math.log(1 + math.exp(-x))


def dpo(w, l):
    return BETA * (w.logratio - l.logratio)


# objective -> the loss of a pair with the sums w and l, and w0: the same as w, but a constant to the gradient
SLOW = {
    "dpo": lambda w, l, w0: nls(dpo(w, l)),
    "fdpo": lambda w, l, w0: nls(BETA * (math.exp(-l.logratio) - math.exp(-w.logratio))),
    "tdpo1": lambda w, l, w0: nls(BETA * (w.logratio - l.logratio - (l.kl - w.kl))),
    "tdpo2": lambda w, l, w0: nls(BETA * (w.logratio - l.logratio - ALPHA * (l.kl - w0.kl))),
    "cDPO": lambda w, l, w0: 0.9 * nls(dpo(w, l)) + 0.1 * nls(-dpo(w, l)),
    "robust DPO": lambda w, l, w0: (0.9 * nls(dpo(w, l)) - 0.1 * nls(-dpo(w, l))) / (1 - 2 * 0.1),
    "IPO": lambda w, l, w0: (w.logratio - l.logratio - 1 / (2 * BETA)) ** 2,
    "hinge": lambda w, l, w0: max(0, 1 - dpo(w, l)),
    "RPO": lambda w, l, w0: nls(dpo(w, l)) - w.logp / w.length,
    "SimPO": lambda w, l, w0: nls(BETA * (w.logp / w.length - l.logp / l.length) - BETA * 0.5),
    "length-normalized DPO": lambda w, l, w0: nls(BETA * w.logratio / w.length - BETA * l.logratio / l.length),
    "DPOP": lambda w, l, w0: nls(BETA * (w.logratio - l.logratio - 50 * max(0, -w.logratio))),
    "TDPO2 with the reverse KL": lambda w, l, w0: nls(BETA * (w.logratio - l.logratio - ALPHA * (l.rkl - w0.rkl))),
    "a weight for each token": lambda w, l, w0: nls(dpo(w, l)),
}


def slow_mean(objective, logits, ref_logits, labels, sequence, fixed=None):
    """(mean loss, what the gradient takes as constant, sums) of four pairs: responses 1, 3, ... over 0, 2, ..."""
    tokens = [slow_token(*x) for x in zip(logits, ref_logits, labels)]
    fixed, sums = fixed or tokens, []
    for part in (tokens, fixed):
        total = [[0.0] * 5 for _ in range(8)]
        for token, constant, s in zip(part, fixed, sequence):
            weight = 1
            if objective == "a weight for each token":
                weight = math.exp(min(max(constant.logratio, -0.5), 1.5))
            total[s] = [a + weight * b for a, b in zip(total[s], token)]
        sums.append([tdpo.Sums(*x) for x in total])
    return np.mean([SLOW[objective](sums[0][w], sums[0][w - 1], sums[1][w]) for w in (1, 3, 5, 7)]), tokens, sums[0]


def numeric(f, x):
    """The gradient of f at a tensor x by central differences."""
    result, h = torch.zeros_like(x), 1e-5
    for index in np.ndindex(*x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.detach().clone()
            moved[index] += sign * h
            ends.append(f(moved))
        result[index] = (ends[0] - ends[1]) / (2 * h)
    return result


def random_case(seed=0, B=6, T=6, V=5):
    """Logits and labels (B, T) with a prompt of 1 to 3 tokens and padding after the response; rows of three pairs."""
    g = torch.Generator().manual_seed(seed)
    pi, ref = (torch.randn(B, T, V, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, V, (B, T), generator=g)
    for b in range(B):
        labels[b, :1 + b % 3] = -100
        labels[b, T - b % 2:] = -100
    return pi.requires_grad_(), ref, labels, torch.tensor([0, 3, 2]), torch.tensor([1, 4, 5])


def fused_case(seed=0, pairs=5, d=6, V=11, dtype=torch.float64):
    """hidden, weight, ref_hidden, ref_weight, labels, pair, chosen of pairs of 1 to 6 tokens a response."""
    g = torch.Generator().manual_seed(seed)
    pair, chosen = [], []
    for n in range(pairs):
        w, l = torch.randint(1, 7, (2,), generator=g).tolist()
        pair += [n] * (w + l)
        chosen += [True] * w + [False] * l
    shapes = ((len(pair), d), (V, d), (len(pair), d), (V, d))
    tensors = [torch.randn(x, generator=g, dtype=torch.float64)for x in shapes]
    labels = torch.randint(0, V, (len(pair),), generator=g)
    return cast([*tensors, labels, torch.tensor(pair), torch.tensor(chosen)], dtype)


def cast(case, dtype):
    """A fused case in a different dtype; hidden and weight take a gradient."""
    case = [x.detach().to(dtype) if x.is_floating_point() else x for x in case]
    return [x.requires_grad_(n < 2) if x.is_floating_point() else x for n, x in enumerate(case)]


def rounded_case(V):
    """A fused case in fp32, and its operands rounded to bf16, in float64."""
    case = fused_case(pairs=40, d=64, V=V, dtype=torch.float32)
    case[1], case[3] = 0.1 * case[1].detach(), 0.1 * case[3]
    return case, cast(cast(case, torch.bfloat16), torch.float64)


def bytes_of(tokens, V):
    """The CHUNK_BYTES of chunks of so many tokens, of which a CPU takes a quarter."""
    return 4 * 4 * V * tokens


def whole(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen):
    """(mean loss, stats) of the method tdpo2 without the fused form: the logits of all N tokens at once."""
    tokens = tdpo.token_stats(hidden @ weight.T, ref_hidden @ ref_weight.T, labels)
    w, l = slice(1, None, 2), slice(0, None, 2)
    losses, stats = tdpo._pair_losses(tokens, labels, 2 * pair + chosen, 2 * int(pair[-1]) + 2, w, l, "tdpo2", {})
    return losses.mean(), stats


def objectives():
    """{name: (where, lines)} of README's table under "Change the objective"."""
    section = text_of("README.md").split("Change the objective")[-1]
    rows = re.findall(r"^\| (.*?) \| ((?:`dpo` in |`tdpo2` in )?`\w+`) \| (`.*`) \|$", section, re.M)
    return {name: (where.replace("`", ""), re.findall(r"`(.*?)`", lines)) for name, where, lines in rows}


def edited(where, lines):
    """tdpo.py as a module, with one edit as README describes it."""
    method, new = where.split()[0], "\n    ".join(lines)
    places = {"preference_loss": r"(\n    )loss = .*", "sum_tokens": r"(\n    )(?=length = )"}
    place = places.get(where, rf'(method == "{method}":\n +)v = .*')
    if where == "sum_tokens":
        new += "\n    "
    source, count = re.subn(place, lambda match: match[1] + new, text_of("tdpo.py"))
    assert count == 1, where
    module = types.ModuleType("edited")
    exec(compile(source, "edited", "exec"), vars(module))
    return module


def test_readme_changes_ten_objectives():
    assert len(objectives()) >= 10


@pytest.mark.parametrize("name", [*METHODS, *objectives()])
def test_value_and_gradient_equal_the_slow_loop(name, monkeypatch):
    module, method = tdpo, name
    if name not in METHODS:
        where, lines = objectives()[name]
        module, method = edited(where, lines), where.split()[0] if " in " in where else "dpo"
    (objective,) = [key for key in SLOW if name.startswith(key)]
    hidden, weight, ref_hidden, ref_weight, labels, pair, chosen = case = fused_case(d=3, V=4, pairs=4)
    logits, ref_logits, sequence = hidden @ weight.T, ref_hidden @ ref_weight.T, 2 * pair + chosen
    w, l = torch.arange(1, 8, 2), torch.arange(0, 8, 2)

    def slow(logits, fixed=None):
        return slow_mean(objective, logits.tolist(), ref_logits.tolist(), labels.tolist(), sequence.tolist(), fixed)
    value, fixed, sums = slow(logits)
    d_logits = numeric(lambda x: slow(x, fixed)[0], logits)
    assert d_logits.abs().max() > 1e-3

    def check(losses, stats, gradients):
        assert losses.mean().item() == approx(value, rel=1e-10) and close(stats["loss"].mean(), losses.mean())
        assert not any(x.requires_grad for x in stats.values())
        for s in range(8):
            found = [stats[f"{field}_{'lw'[s % 2]}"][s // 2].item() for field in tdpo.TokenStats._fields]
            assert found == approx(list(sums[s][:4]), rel=1e-10)
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in gradients)

    # from logits: every response is a row that follows a prompt of 1 to 3 tokens, and logits at t predict token t + 1
    pi, ref, rows = torch.randn(8, 12, 4).double(), torch.randn(8, 12, 4).double(), torch.full((8, 12), -100)
    places = [(s, s % 3 + n) for s in range(8) for n in range((sequence == s).sum())]
    order, places = sequence.argsort(stable=True), tuple(torch.tensor(places).T)
    pi[places], ref[places] = logits.detach()[order], ref_logits[order]
    rows[places[0], places[1] + 1] = labels[order]
    d_pi = torch.zeros_like(pi).index_put(places, d_logits[order])
    losses, stats = module.tdpo_loss(pi.requires_grad_(), ref, rows, w, l, method, beta=BETA, alpha=ALPHA)
    check(losses, stats, [(grad(losses.mean(), pi)[0], d_pi)])

    # from hidden states, in chunks of any size: pieces of a pair, whole pairs, all of them
    for tokens in range(1, len(labels) + 1):
        monkeypatch.setattr(module, "CHUNK_BYTES", bytes_of(tokens, V=4))
        loss, stats = module.fused_tdpo_loss(*case, method, beta=BETA, alpha=ALPHA)
        d_hidden, d_weight = grad(3 * loss, case[:2])
        check(loss, stats, [(d_hidden, 3 * d_logits @ weight), (d_weight, 3 * d_logits.T @ hidden)])


@pytest.mark.parametrize("method", METHODS)
def test_equal_models_give_log_2_and_no_divergence(method):
    pi, _, labels, yw, yl = random_case(T=50, V=300)
    losses, stats = tdpo.tdpo_loss(pi.float(), pi.float().clone(), labels, yw, yl, method)
    assert losses.tolist() == approx([math.log(2)] * 3, abs=1e-7)
    for name in ("kl_w", "kl_l", "rkl_w", "rkl_l", "logratio_w", "logratio_l"):
        assert stats[name].tolist() == [0.0] * 3


def test_prompt_and_padding_logits_change_nothing():
    pi, ref, labels, yw, yl = random_case()
    expected, _ = tdpo.tdpo_loss(pi, ref, labels, yw, yl)
    predicts = torch.cat([labels[:, 1:] != -100, torch.zeros(len(labels), 1, dtype=torch.bool)], 1)
    pi = pi.detach().masked_fill(~predicts[..., None], math.nan).requires_grad_()
    losses, _ = tdpo.tdpo_loss(pi, ref, labels, yw, yl)
    losses.sum().backward()
    assert torch.equal(losses, expected) and (pi.grad.abs().sum(-1) > 0).equal(predicts)


@pytest.mark.parametrize("gap", (1e2, 1e4))
@pytest.mark.parametrize("method", METHODS)
def test_extreme_logits_stay_finite(gap, method):
    pi, ref, labels, *pairs = random_case(V=9)
    pi, ref = (gap * pi.detach()).float(), (-gap * ref).float()
    pi[..., 7:] = ref[..., 7:] = -math.inf             # vocabulary entries masked in both
    losses, stats = tdpo.tdpo_loss(pi.requires_grad_(), ref, labels.clamp(max=4), *pairs, method=method)
    losses.sum().backward()
    assert torch.isfinite(torch.cat([losses, pi.grad.flatten(), *stats.values()])).all()
    assert all((x >= 0).all() for name, x in stats.items() if "kl" in name)


def test_bf16_logits_are_summed_in_fp32():
    pi, ref, *rest = random_case()
    losses, stats = tdpo.tdpo_loss(pi.bfloat16(), ref.bfloat16(), *rest)
    assert torch.allclose(losses, tdpo.tdpo_loss(pi.bfloat16().float(), ref.bfloat16().float(), *rest)[0])
    assert all(x.dtype == torch.float32 and x.shape == (3,) for x in stats.values())


def test_the_reference_gets_no_gradient():
    pi, ref, labels, yw, yl = random_case()
    tdpo.tdpo_loss(pi, ref.requires_grad_(), labels, yw, yl)[0].sum().backward()
    assert ref.grad is None and pi.grad is not None


def test_unknown_method_lists_the_known_ones():
    sums = tdpo.Sums(*torch.zeros(5, 2))
    with pytest.raises(ValueError, match="dpo, fdpo, tdpo1, tdpo2"):
        tdpo.margin("tdpo3", sums, sums)
    with pytest.raises(ValueError, match="dpo, fdpo, tdpo1, tdpo2"):
        tdpo.fused_tdpo_loss(*fused_case(), method="tdpo")


# ---------------------------------------------------------------------------------------------------------------------
# fused form


class Memory(TorchDispatchMode):
    """The peak of the bytes that tensors hold which were made meanwhile."""
    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.alive[storage.data_ptr()] = weakref.ref(storage), storage.nbytes()
        self.alive = {key: value for key, value in self.alive.items() if value[0]() is not None}
        self.peak = max(self.peak, sum(n for _, n in self.alive.values()))
        return out


def test_memory_of_the_fused_form_is_bounded_for_any_length(monkeypatch):
    """One pair of 960 tokens beside 120 pairs of 8, in chunks of 64 tokens; naive logits have 960."""
    hidden, weight, ref_hidden, ref_weight, labels, *_ = fused_case(pairs=200, d=2, V=300, dtype=torch.float32)
    peaks, token = [], torch.arange(960)
    for length in (8, 960):
        pair, chosen = token // length, token % length < length // 2
        case = [hidden[:960], weight, ref_hidden[:960], ref_weight, labels[:960], pair, chosen]
        for budget in (64, 960):
            monkeypatch.setattr(tdpo, "CHUNK_BYTES", bytes_of(budget, V=300))
            with Memory() as memory:
                tdpo.fused_tdpo_loss(*case)
            peaks.append(memory.peak)
    short, short_whole, long, long_whole = peaks
    assert long < 1.4 * short and short < 0.15 * short_whole and long_whole < 1.1 * short_whole, peaks


class Products:
    """Counts tdpo.py's products with the output layer."""
    def __init__(self, monkeypatch):
        self.count, product = 0, tdpo._product

        def counted(*args):
            self.count += 1
            return product(*args)
        monkeypatch.setattr(tdpo, "_product", counted)


@pytest.mark.parametrize("trained", ([True, True], [True, False], [False, True], [False, False]))
def test_gradients_cost_products_only_where_they_are_wanted(trained, monkeypatch):
    """Of hidden states and weights: adapters train no output layer, and frozen bodies only that."""
    case, products = fused_case(), Products(monkeypatch)
    loss, expected = tdpo.fused_tdpo_loss(*case)[0], None
    expected, products.count = grad(loss, case[:2]), 0
    inputs = [x.detach().requires_grad_(wanted) for x, wanted in zip(case, trained)]
    found, _ = tdpo.fused_tdpo_loss(*inputs, *case[2:])
    assert close(found, loss) and found.requires_grad == any(trained)
    # the logits of both models, and the weight's gradient
    assert products.count == 2 + trained[1]
    if any(trained):
        found.backward()
    for x, right, wanted in zip(inputs, expected, trained):
        assert close(x.grad, right) if wanted else x.grad is None


@pytest.mark.parametrize("without", (torch.no_grad, torch.inference_mode))
def test_fused_evaluates_without_gradients(without):
    case = fused_case()
    expected = tdpo.fused_tdpo_loss(*case)[0].item()
    with without():
        loss, _ = tdpo.fused_tdpo_loss(*case)
    assert loss.item() == expected and not loss.requires_grad


def test_fused_refuses_a_second_derivative_and_disordered_pairs():
    case = fused_case()
    loss, _ = tdpo.fused_tdpo_loss(*case)
    with pytest.raises(RuntimeError):
        (d_hidden,) = grad(loss, case[0], create_graph=True)
        (loss + d_hidden.square().sum()).backward()         # a penalty on the gradient must not get lost in silence
    for pair, said in ((case[5].flip(0), "sorted by pair"), (2 * case[5], "gaps"),
                       (case[5][:-1], "one entry for each"), (case[5][:0], "one entry for each")):
        with pytest.raises(ValueError, match=said):
            tdpo.fused_tdpo_loss(*case[:5], pair, case[6])


def test_a_knob_that_is_no_number_is_refused_before_chunks_mix_the_pairs(monkeypatch):
    monkeypatch.setattr(tdpo, "CHUNK_BYTES", 1)
    with pytest.raises(RuntimeError):
        tdpo.fused_tdpo_loss(*fused_case(pairs=5), beta=torch.linspace(0.1, 0.5, 5))


@pytest.mark.parametrize("side", (True, False))
def test_pairs_that_lack_a_response_are_refused_in_both_forms(side):
    """The first, a middle one and the last pair."""
    case, (pi, ref, labels, yw, yl) = fused_case(pairs=3), random_case()
    for missing in range(3):
        keep = (case[5] != missing) | (case[6] != side)
        tokens = [case[n][keep] if n in (0, 2, 4, 5, 6) else case[n] for n in range(7)]
        with pytest.raises(ValueError, match="chosen and rejected tokens"):
            tdpo.fused_tdpo_loss(*tokens)
        empty = labels.clone()
        empty[(yw if side else yl)[missing], 1:] = -100
        with pytest.raises(ValueError, match="chosen and rejected tokens"):
            tdpo.tdpo_loss(pi, ref, empty, yw, yl)


def test_fused_is_accurate_in_fp32_and_under_bf16_autocast():
    """Operands rounded to bf16, as GPUs and CPUs with such products take them, cost less than 2 %; logits that are
    rounded would cost more."""
    hidden, weight, noise, _, *rest = fused_case(pairs=40, d=64, V=500)
    exact = cast([hidden, 0.1 * weight, hidden + 0.05 * noise, 0.1 * weight, *rest], torch.float64)
    low = cast(exact, torch.float32)
    loss, expected = tdpo.fused_tdpo_loss(*exact)

    def error(stats, name):             # of the KLs of 1e-3 and more
        keep = expected[name] >= 1e-3
        assert keep.sum() > 10
        return ((stats[name] - expected[name]).abs() / expected[name])[keep].max()
    _, single = tdpo.fused_tdpo_loss(*low)
    with torch.autocast("cpu", torch.bfloat16):
        autocast_loss, autocast = tdpo.fused_tdpo_loss(*low)
        _, by_unfused = whole(*low)
    for stats, limit in ((single, 1e-4), (autocast, 2e-2)):
        assert max(error(stats, "kl_w"), error(stats, "kl_l")) < limit < error(by_unfused, "kl_l")
    for a, b in zip(grad(autocast_loss, low[:2]), grad(loss, exact[:2])):
        assert (a - b).norm() / b.norm() < 1e-2


@pytest.fixture
def cuda_autocast():
    """autocast itself switches off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", False)


class OnGPU(torch.Tensor):
    """A tensor of the CPU that takes the branches of a GPU: what torch.mm(out_dtype=) gives there are the products of
    rounded operands in fp32."""
    device, is_cuda, products = torch.device("cuda"), True, []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to and isinstance(args[1], torch.device):
            return args[0].as_subclass(cls)
        if func is torch.mm:
            cls.products.append((args[0].dtype, args[1].dtype, kwargs.pop("out_dtype")))
            args = [x.float() for x in args]
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_fused_takes_the_branches_of_a_gpu(cuda_autocast, monkeypatch):
    """Emulated: rounded operands, fp32 logits, fp32 sums; against float64 on the same rounded operands."""
    case, rounded = rounded_case(V=500)
    expected, _ = whole(*rounded)
    monkeypatch.setattr(tdpo, "CHUNK_BYTES", 4 * 500 * 12)
    monkeypatch.setattr(OnGPU, "products", [])
    inputs = [x.detach().as_subclass(OnGPU).requires_grad_() for x in case[:2]]
    loss, stats = tdpo.fused_tdpo_loss(*inputs, *[x.as_subclass(OnGPU) for x in case[2:]])
    assert loss.dtype == torch.float32 and loss.item() == approx(expected.item(), rel=1e-5)
    for found, right in zip(grad(loss, inputs), grad(expected, rounded[:2])):
        assert found.dtype == torch.float32 and (found - right).norm() / right.norm() < 4e-3
    # of every chunk the two logits and the weight's gradient
    assert set(OnGPU.products) == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    assert len(OnGPU.products) % 3 == 0 and len(OnGPU.products) // 3 >= len(case[0]) // 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
@pytest.mark.parametrize("V", [500, 50257])
def test_gpu_fused_is_that_of_rounded_operands_and_waits_for_nothing(V):
    """The same on a GPU; the large vocabulary is compiled."""
    case, rounded = rounded_case(V)
    expected, _ = whole(*rounded)
    inputs = [x.detach().cuda().requires_grad_(n < 2) for n, x in enumerate(case[:4])]
    inputs.append(case[4].cuda())
    with torch.autocast("cuda", torch.bfloat16):
        tdpo.fused_tdpo_loss(*inputs, *case[5:])        # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, _ = tdpo.fused_tdpo_loss(*inputs, *case[5:])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == approx(expected.item(), rel=1e-5)
    for found, right in zip(grad(loss, inputs[:2]), grad(expected, rounded[:2])):
        assert (found.cpu() - right).norm() / right.norm() < 1e-2


@pytest.mark.parametrize("tokens", (1, 4, 9, 512))
def test_sft_loss_is_cross_entropy(tokens, monkeypatch):
    hidden, weight, _, _, labels, *_ = fused_case()
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    monkeypatch.setattr(train, "CHUNK_BYTES", bytes_of(tokens, V=11))
    losses = train.sft_loss(hidden, weight, labels)
    assert losses.shape == labels.shape and close(losses, expected)
    for a, b in zip(grad(losses[::2].sum(), (hidden, weight)), grad(expected[::2].sum(), (hidden, weight))):
        assert close(a, b)
    with Memory() as memory:
        train.sft_loss(hidden, weight, labels)
    assert tokens == 512 or memory.peak < len(labels) * 11 * 8 + 8 * 11 * 8 * tokens


def test_fused_takes_bf16_inputs():
    low = cast(fused_case(), torch.bfloat16)
    loss, _ = tdpo.fused_tdpo_loss(*low)
    assert loss.item() == approx(tdpo.fused_tdpo_loss(*cast(low, torch.float32))[0].item(), rel=1e-6)
    assert {x.dtype for x in grad(loss, low[:2])} == {torch.bfloat16} != {loss.dtype}


def gradient(loss, case):
    found = loss(*case)
    return grad(found[0] if isinstance(found, tuple) else found, case[0])[0]


def test_both_forms_work_under_compile():
    compiled = functools.partial(torch.compile, backend="aot_eager")
    for loss, case in ((tdpo.fused_tdpo_loss, fused_case()), (tdpo.tdpo_loss, random_case())):
        def outer(*case):
            return 2 * loss(*case)[0].mean()
        assert close(gradient(compiled(outer), case), gradient(outer, case))


def test_fused_compiles_its_elementwise_part_and_runs_without_a_compiler(monkeypatch, caplog):
    case, counters = fused_case(dtype=torch.float32), torch._dynamo.utils.counters["frames"]
    expected, before = gradient(tdpo.fused_tdpo_loss, case), counters["ok"]
    monkeypatch.setattr(tdpo, "COMPILE_VOCAB", 1)
    assert torch.allclose(gradient(tdpo.fused_tdpo_loss, case), expected, atol=1e-6)
    assert counters["ok"] > before and tdpo.token_stats in tdpo._compiled

    torch._dynamo.reset()
    monkeypatch.setattr(tdpo, "_compiled", {})
    logger = logging.getLogger("torch._dynamo")
    logger.addHandler(caplog.handler)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        assert torch.allclose(gradient(tdpo.fused_tdpo_loss, case), expected, atol=1e-6)
    logger.removeHandler(caplog.handler)
    torch._dynamo.reset()
    assert "no-such-compiler" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# rows against separate sequences


SIZES = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
GPT = dict(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
MIDDLE = dict(intermediate_size=48)
GROUPS = dict(**MIDDLE, num_key_value_heads=2)

# models that take a registered attention function, and those of which some versions of transformers take none
REGISTERED = {
    "gpt2": hf.GPT2Config(**GPT),
    "llama": hf.LlamaConfig(**SIZES, **GROUPS, tie_word_embeddings=False),
    "gpt_neox": hf.GPTNeoXConfig(**SIZES, **MIDDLE),
    "qwen3": hf.Qwen3Config(**SIZES, **GROUPS, head_dim=8, tie_word_embeddings=True),
    "phi": hf.PhiConfig(**SIZES, **MIDDLE),              # whose output layer has a bias
}
OTHERS = {
    "gpt_neo": hf.GPTNeoConfig(**SIZES, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "falcon": hf.FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "biogpt": hf.BioGptConfig(**SIZES, **MIDDLE),        # takes one, although it does not say so
}


def tiny(config, seed=0):
    torch.manual_seed(seed)
    if isinstance(config, str):
        config = {**REGISTERED, **OTHERS}[config]
    model = AutoModelForCausalLM.from_config(config).eval()
    for bias in [p for name, p in model.named_parameters() if name == "lm_head.bias"]:
        torch.nn.init.normal_(bias)
    return model


def save_with_words(model, folder, **options):
    """A Hugging Face directory of a model, with the tokenizer of the embedded task."""
    model.save_pretrained(folder, **options)
    eval_imdb.scratch_model(0)[1].save_pretrained(folder)


def examples_of(seed=0, n=5, V=61):
    """n pairs of random tokens, 2 to 8 in the prompt and in each response."""
    rng, examples = np.random.default_rng(seed), []
    for _ in range(n):
        examples.append(example_of(*[rng.integers(0, V, k).tolist() for k in rng.integers(2, 9, 3)]))
    return examples


def example_of(prompt, chosen, rejected, where="", text=""):
    return train.Example(where, text, prompt, chosen, rejected)


def test_a_row_is_what_is_drawn_above_collate():
    examples = [example_of([5, 6, 7], [1, 2, 3, 4], [8, 9, 9]), example_of([5, 6], [1, 2], [3, 4])]
    ids, position = [5, 6, 7, 1, 2, 3, 8, 9, 5, 6, 1, 3], [0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 2]
    for length, padding in ((0, []), (15, [0] * 3)):
        row = train.collate(examples, length)
        assert row["ids"].tolist() == [ids + padding] and row["position"].tolist() == [position + padding]
        assert row["labels"].tolist() == [1, 2, 3, 4, 8, 9, 9, 1, 2, 3, 4]
        assert row["pair"].tolist() == [0] * 7 + [1] * 4
        assert row["chosen"].tolist() == [True] * 4 + [False] * 3 + [True] * 2 + [False] * 2


def own_loss(model, ref, examples, attention="pairs", **knobs):
    """Loss and stats of one row, as train.py takes them. attention: pairs or flex; traced is flex as it is compiled for
    a GPU, but run uncompiled, and compiled is flex on a GPU."""
    batch, states = train.collate(examples, 0 if attention == "pairs" else 128, model.device), []
    for m in (model, ref):
        m.set_attn_implementation("pair_attention")
        body = m.base_model
        if attention in ("traced", "compiled"):
            backend = "aot_eager" if attention == "traced" else "inductor"
            body = torch.compile(body, backend=backend, dynamic=False)
        states += [train.response_states(body, m, batch), train.output_weight(m)]
    return tdpo.fused_tdpo_loss(*states, batch["labels"], batch["pair"], batch["chosen"], **knobs)


def losses_of_sequences(model, ref, examples):
    """The same of separate sequences, padded on the right, through tdpo_loss."""
    prompts, responses = [e.prompt for e in examples for _ in range(2)], []
    for example in examples:
        responses += [example.chosen, example.rejected]
    rows = [torch.tensor(prompt + y) for prompt, y in zip(prompts, responses)]
    labels = [torch.tensor([-100] * len(prompt) + y) for prompt, y in zip(prompts, responses)]
    ids, labels = pad_sequence(rows, True).to(model.device), pad_sequence(labels, True, -100).to(model.device)
    real = pad_sequence([torch.ones(len(row)) for row in rows], True).to(model.device)
    logits = [m(ids, attention_mask=real).logits for m in (model, ref)]
    w, l = torch.arange(0, len(ids), 2), torch.arange(1, len(ids), 2)
    losses, stats = tdpo.tdpo_loss(*logits, labels, w, l, beta=BETA, alpha=ALPHA)
    losses.mean().backward()
    return stats


@pytest.fixture
def eager_flex(monkeypatch):
    """FlexAttention on a CPU, forward and backward, uncompiled: compiled it would be a different kernel."""
    def attention(*args, training=False, **options):
        return flex.flex_attention(*args, **options)
    monkeypatch.setattr(flex, "_validate_device", lambda *args: None)
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", attention)


def rows_equal_sequences(model, ref, attention, atol=4e-6):
    """Loss, stats and the gradient of every parameter, of packed rows and of separate sequences."""
    found, examples = [], examples_of()
    for row in (examples[:3], examples[3:]):
        loss, stats = own_loss(model, ref, row, attention, beta=BETA, alpha=ALPHA)
        (loss * len(row) / 5).backward()
        found.append(stats)
    packed = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    for m in (model, ref):
        m.set_attn_implementation("sdpa")
    expected = losses_of_sequences(model, ref, examples)
    for key in expected:
        assert torch.allclose(torch.cat([stats[key] for stats in found]), expected[key], atol=atol), key
    for key, p in model.named_parameters():
        assert torch.allclose(packed[key], p.grad, atol=atol), key


@pytest.mark.parametrize("name, attention", [*itertools.product(REGISTERED, ("pairs", "flex")), ("gpt2", "traced")])
def test_packed_rows_equal_separate_sequences(name, attention, eager_flex):
    rows_equal_sequences(tiny(name), tiny(name, 1), attention)


@pytest.mark.parametrize("name", OTHERS)
def test_models_without_a_registered_attention_function_are_refused(name):
    model = tiny(name)
    model.set_attn_implementation("pair_attention")
    error = train.packing_error(model, examples_of())
    if error:
        assert name != "biogpt" and error.startswith("its layers take no attention function")
    else:
        rows_equal_sequences(model, tiny(name, 1), "pairs")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
@pytest.mark.parametrize("name", REGISTERED)
def test_gpu_compiled_flex_rows_equal_separate_sequences(name):
    # its kernels want heads of 16
    config = copy.deepcopy(REGISTERED[name])
    config.hidden_size = 64
    if hasattr(config, "head_dim"):
        config.head_dim = 16
    rows_equal_sequences(tiny(config).cuda(), tiny(config, 1).cuda(), "compiled", atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes a GPU")
def test_gpu_compiled_run_is_that_of_an_eager_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for x in eval_imdb.scratch_model(0):
        x.save_pretrained("sft")
    write_lines("pairs.jsonl", review_pairs(60))
    for compiled in ("True", "False"):
        trained(compiled, f"--compile={compiled}", "--dtype=float32", "--max_steps=4", "--eval_interval=0")
    for a, b in zip(steps_of("True"), steps_of("False"), strict=True):
        for name in ("loss", "margin", "kl_w", "kl_l", "grad_norm"):
            assert a[name] == approx(b[name], rel=1e-2, abs=1e-5), name


def test_a_compiled_body_takes_every_block_mask_with_one_graph(eager_flex):
    torch._dynamo.reset()
    model, counters = tiny("gpt2"), torch._dynamo.utils.counters["stats"]
    model.set_attn_implementation("pair_attention")
    body, before = torch.compile(model.base_model, backend="eager", dynamic=False), counters["unique_graphs"]
    for seed in range(3):
        a, b = (train.collate(examples_of(seed), length) for length in (128, 0))
        states = train.response_states(body, model, a), train.response_states(model.base_model, model, b)
        assert torch.allclose(*states, atol=2e-6)
    assert counters["unique_graphs"] - before == 1


LONGEST = max(len(e.prompt) + max(len(e.chosen), len(e.rejected)) - 1 for e in examples_of())
GEMMA = dict(**SIZES, **GROUPS, head_dim=8)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28,
              patch_size=14)
SOFTCAPS = dict(final_logit_softcapping=None, attn_logit_softcapping=None)
REFUSED = {
    "its logit_scale": hf.CohereConfig(**SIZES, **MIDDLE, logit_scale=0.5),
    "its logits_scaling": hf.GraniteConfig(**SIZES, **MIDDLE, logits_scaling=1.001),
    "its final_logit_softcapping": hf.Gemma2Config(**GEMMA, **{**SOFTCAPS, "final_logit_softcapping": 30.0}),
    "softcapping or sinks,": hf.Gemma2Config(**GEMMA, **{**SOFTCAPS, "attn_logit_softcapping": 5.0}),
    "its sliding_window of": hf.MistralConfig(**SIZES, **GROUPS, sliding_window=LONGEST - 1),
    "recurrent or convolutional layers": hf.FalconH1Config(**GEMMA, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
                                                           mamba_d_state=8, mamba_n_groups=1),
    "does not separate its body": hf.Llama4TextConfig(**SIZES, **GROUPS, head_dim=8, intermediate_size_mlp=48,
                                                      num_local_experts=2),
    "Conv1d|recurrent|no attention function": hf.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1),
}
SERVED = {
    **REGISTERED,
    "gemma3": hf.Gemma3TextConfig(**GEMMA),
    "gemma3 with images": hf.Gemma3Config(text_config=dict(GEMMA), vision_config=dict(VISION)),
    "mistral": hf.MistralConfig(**SIZES, **GROUPS, sliding_window=LONGEST),
}


def packing_error(model, examples=examples_of(), **options):
    model.set_attn_implementation("pair_attention")
    return train.packing_error(model, examples, **options)


@pytest.mark.parametrize("said", REFUSED)
def test_models_that_rows_cannot_serve_are_refused(said):
    assert re.search(said, packing_error(tiny(REFUSED[said])))


@pytest.mark.parametrize("name", SERVED)
def test_models_that_rows_can_serve_are_not_refused(name):
    model = tiny(SERVED[name])
    assert packing_error(model) == "" and sample.positions_of(model) == 128


@pytest.fixture
def longrope():
    """Two models that take other frequencies in a pass that has a text of more than 16 tokens."""
    rope = dict(rope_type="longrope", rope_theta=1e4, factor=8.0, short_factor=[1.0, 1.0, 1.1, 1.2],
                long_factor=[1.5, 3.0, 9.0, 30.0], original_max_position_embeddings=16)
    config = hf.Phi3Config(**SIZES, **GROUPS, pad_token_id=0, original_max_position_embeddings=16, rope_parameters=rope)
    models = [tiny(config, seed) for seed in (0, 1)]
    # so large that frequencies matter
    for p in itertools.chain(*[model.parameters() for model in models]):
        p.data *= 8 if p.dim() > 1 else 1
    return models


def test_rows_hold_sequences_of_one_side_of_a_longrope_border(longrope):
    """The border itself is a length of the short side. Of a response all but the last token is read."""
    at, beyond, far, split = [example_of([5] * 10, [6] * a, [7] * b) for a, b in ((7, 3), (8, 9), (9, 20), (3, 20))]
    # as some models have it, for each type of layer
    config = longrope[0].config
    typed = hf.Gemma3TextConfig(**GEMMA)
    typed.rope_parameters = dict(full_attention=config.rope_parameters, sliding_attention=dict(rope_type="default"))
    assert sample.rope_border(types.SimpleNamespace(config=typed)) == sample.rope_border(longrope[0]) == 16
    for examples, shortest, fits in (([at, at], 12, True), ([beyond, far], 17, True), ([beyond, far], 16, False),
                                     ([at, far], 12, False), ([far, at], 12, False), ([split, split], 12, False)):
        found = packing_error(longrope[0], examples, shortest=shortest)
        assert found.startswith("its LongRoPE") != fits and (found == "") == fits


def test_data_on_both_sides_of_a_longrope_border_are_refused(runs, longrope):
    """Also if neither the first row nor the longest one lies on the shorter side."""
    config = copy.deepcopy(longrope[0].config)
    config.vocab_size = 163
    save_with_words(tiny(config), "long-rope")
    data = write_lines("both-sides.jsonl", [*lines_of("pairs.jsonl"), GOOD])
    says(1, "in packed rows: its LongRoPE", "train.py", *on_pairs(
        "both-sides", f"--data={data}", "--init_from=long-rope", "--max_steps=1"))


def test_samples_beside_a_longer_one_are_drawn_and_measured_as_if_it_were_not_there(longrope):
    (model, ref), tokenizer = longrope, types.SimpleNamespace(eos_token_id=None)
    prompts, responses = [[5, 6], [7] * 11, [8] * 30, [9] * 17], [[1, 2, 3], [4] * 6, [2, 3], [5] * 3]
    model.generation_config.eos_token_id = None
    stats = sample.measure(model, ref, prompts, responses)
    for prompt, response, found in zip(prompts, responses, stats):
        ids, n = torch.tensor([prompt + response[:-1]]), len(response)
        p, q = (m(ids).logits[0, -n:].double().log_softmax(-1) for m in (model, ref))
        assert found["kl"].tolist() == approx((q.exp() * (q - p)).sum(-1).tolist(), rel=1e-3)
        assert found["surprisal"].tolist() == approx((-p[range(n), response]).tolist(), rel=1e-3)
    # so cold that nothing is left to chance
    together = sample.generate(model, tokenizer, prompts, 8, temperature=1e-6)
    assert together == [sample.generate(model, tokenizer, [x], 8, temperature=1e-6)[0] for x in prompts]


def test_a_reason_that_no_configuration_gives_is_found_by_comparison(monkeypatch):
    """In pieces of a few logits. In a row that leaks, the last token of the last response may be the only one that is
    wrong."""
    model, examples, pieces = tiny("gpt2"), examples_of(), []
    forward = model.forward

    def watched(*args, logits_to_keep, **options):
        pieces.append(len(logits_to_keep))
        return forward(*args, logits_to_keep=logits_to_keep, **options)
    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr(train, "CHUNK_BYTES", 3 * 4 * 61)
    assert packing_error(model, examples) == ""
    assert max(pieces) == 3 and sum(pieces) == sum(len(e.chosen) + len(e.rejected) for e in examples)
    sees = train.sees

    def leaking(q, k, pair, part):
        last = len(pair) - 1
        return sees(q, k, pair, part) | ((q == last) & (pair[last] == pair[k]))
    monkeypatch.setattr(train, "sees", leaking)
    assert packing_error(model, examples).startswith("packed rows give other logits than separate sequences")


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")))
def test_a_check_that_runs_out_of_memory_says_so(error, monkeypatch):
    model = tiny("gpt2")
    monkeypatch.setattr(model.transformer, "forward", mock.Mock(side_effect=error))
    with pytest.raises(type(error)) as found:
        packing_error(model)
    assert found.value is error


def test_pack_keeps_within_bounds():
    lengths = np.random.default_rng(0).integers(1, 100, 300).tolist()
    rows = train.pack(lengths, 128)
    assert sorted(sum(rows, [])) == list(range(300))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 128
    assert len(rows) <= 1.05 * sum(lengths) / 128 + 1


def test_a_step_takes_each_pair_once_an_epoch():
    seen = [i for step in range(5) for i in train.step_indices(step, 8, 20, 3)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20)) and seen[:20] != seen[20:]


def test_rows_are_filled():
    """Simulated on lengths like HH's, in the steps of a run: the share of the places in rows that hold a token."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(5.4, 0.5, 2000).clip(40, 760).astype(int).tolist()
    for world, share in ((1, 0.88), (2, 0.88), (4, 0.82), (8, 0.75)):
        with mock.patch.multiple(train, batch_size=64, seed=1):
            length = train.choose_length(sizes, max(sizes), 8192, world)
        assert length % 128 == 0 and 1024 <= length <= 8192
        tokens, places = 0, 0
        for step in range(30, 130):
            step = [sizes[i] for i in train.step_indices(step, 64, len(sizes), 1)]
            tokens += sum(step)
            places += math.ceil(len(train.pack(step, length)) / world) * world * length
        assert tokens / places >= share, (world, length, tokens / places)
    # an example that is longer than a row should be has one of its own; a short row stays short
    with mock.patch.multiple(train, batch_size=4, seed=1):
        assert train.choose_length([100] * 50 + [1000], 1000, 300, 1) == 1024
        assert train.choose_length([100] * 50, 100, 200, 1) == 256


@pytest.mark.parametrize("decay", ("constant", "linear", "cosine"))
def test_rates_are_those_of_torch(decay):
    """A warm-up of 4 steps, and a decay that reaches 0 at the last of 11."""
    p, found = torch.nn.Parameter(torch.zeros(1)), []
    schedule = torch.optim.lr_scheduler
    opt = torch.optim.SGD([p], lr=0.2)
    after = {"constant": schedule.ConstantLR(opt, 1), "linear": schedule.LinearLR(opt, 1, 0, 6),
             "cosine": schedule.CosineAnnealingLR(opt, 6)}[decay]
    expected = [0.05, 0.1, 0.15, 0.2]
    for group in opt.param_groups:
        group["lr"] = 0.2
    for _ in range(7):
        expected.append(opt.param_groups[0]["lr"])
        opt.step()
        after.step()
    with mock.patch.multiple(train, learning_rate=0.2, warmup_steps=4, max_steps=11, lr_decay=decay):
        found = [train.lr_at(step) for step in range(11)]
    assert found == approx(expected, abs=1e-9) and (found[-1] == approx(0, abs=1e-9)) == (decay != "constant")


def test_metrics_are_of_pairs():
    stats = dict(margin=[-0.1, 0.2], logratio_w=[1.0, -1.0], logratio_l=[0.5, 2.0], kl_w=[0.1, 0.2], kl_l=[4.0, 0.1],
                 rkl_w=[1.0, 2.0], rkl_l=[2.0, 1.5])
    found = train.preference_metrics({name: torch.tensor(x) for name, x in stats.items()})
    for name, x in dict(stats, acc=[1, 0], acc_loss=[0, 1], kl_gap=[3.9, 0.1], rkl_gap=[1.0, 0.5]).items():
        assert found[name].tolist() == approx(x)


# ---------------------------------------------------------------------------------------------------------------------
# larger models: adapters, checkpointing, bf16 where it changes nothing, the memory that a step takes


def adapted(model, rank=3, low=False):
    """{layer's name: adapter} of a model that has got them, with a B as after some steps."""
    train.adapt(model, rank, low)
    adapters = {name: m.parametrizations.weight[0] for name, m in model.named_modules() if parametrized(m)}
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.B, std=0.02)
    return adapters


def parametrized(module):
    return torch.nn.utils.parametrize.is_parametrized(module, "weight")


@pytest.mark.parametrize("low", (False, True))
@pytest.mark.parametrize("name", REGISTERED)
def test_adapters_are_w_plus_ba(name, low):
    """Against the same model whose weights are W + BA. low: W is rounded to bf16, while the adapters and their
    gradients stay in fp32."""
    model, whole, ids = tiny(name), tiny(name), torch.tensor([examples_of()[0].prompt * 4])
    before, adapters = model(ids).logits, adapted(model, low=low)
    assert len(adapters) >= 8 and not any("lm_head" in layer or "embed" in layer for layer in adapters)
    for layer, adapter in adapters.items():
        base = model.get_submodule(layer).parametrizations.weight.original
        assert base.dtype == (torch.bfloat16 if low else torch.float32)
        whole.get_submodule(layer).weight.data = base.float() + 32 / 3 * adapter.B @ adapter.A
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        logits, expected = model(ids).logits.float(), whole(ids).logits.float()
        logits.square().mean().backward()
    assert torch.dist(logits, expected) < (0.03 if low else 1e-5) * expected.norm() < torch.dist(logits, before)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {f"{layer}.parametrizations.weight.0.{x}" for layer in adapters for x in "AB"}
    assert all(x.dtype == torch.float32 and x.any() for x in gradients.values())


@pytest.mark.parametrize("name", REGISTERED)
def test_weights_in_bf16_change_no_bit_under_autocast(name):
    """Where they are numbers of bf16 already, in fp32 neither; others stay in fp32."""
    ids, found = torch.tensor([examples_of()[0].prompt * 4]), []
    for low in (False, True):
        model = tiny(name)
        model.load_state_dict({key: x.bfloat16().float() for key, x in model.state_dict().items()})
        train.adapt(model, 0, low)
        with torch.autocast("cpu", torch.bfloat16):
            found.append((model(ids).logits, sum(p.nbytes for p in model.parameters())))
        found[-1] += (model(ids).logits,)
    (a, many, c), (b, few, d) = found
    assert torch.equal(a, b) and torch.equal(c, d) and few < 0.9 * many
    model = tiny(name)
    train.adapt(model, 0, low=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name, rank", [*((x, 0) for x in REGISTERED), ("llama", 3), ("gpt2", 3)])
def test_checkpointed_blocks_give_the_same_gradients(name, rank):
    grads, counts = [], []
    for checkpointed in (False, True):
        model, ref, calls = tiny(name), tiny(name, 1), []
        if rank:
            adapted(model, rank)
        for block in train.blocks_of(model):
            next(block.children()).register_forward_hook(lambda *args: calls.append(1))
        if checkpointed:
            train.checkpoint_blocks(model)
        loss, _ = own_loss(model, ref, examples_of())
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        counts.append(len(calls))
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and counts[1] == 2 * counts[0] == 4


def test_adapters_and_checkpointed_blocks_compile(eager_flex):
    """As on a GPU, where a run is compiled: one graph, the gradients of the model that is not compiled."""
    config = copy.deepcopy(REGISTERED["llama"])
    config.num_hidden_layers = 1
    grads = []
    for attention in ("flex", "traced"):
        torch._dynamo.reset()
        model, ref = tiny(config), tiny(config, 1)
        adapted(model)
        train.checkpoint_blocks(model)
        torch._dynamo.utils.counters.clear()
        loss, _ = own_loss(model, ref, examples_of()[:3], attention)
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads)) and any(x.any() for x in grads[1])
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]      # policy and reference


@pytest.mark.parametrize("kind, moments", [(torch.optim.RMSprop, 1), (torch.optim.AdamW, 2)])
def test_trying_a_row_changes_nothing(kind, moments, monkeypatch):
    """Buffers as large as the optimizer's state are held while the row is tried."""
    weight, made = torch.nn.Parameter(torch.randn(4, 5)), []
    empty_like = torch.empty_like

    def counted(x):
        made.append(x.shape)
        return empty_like(x)

    def forward(batch, counts):
        assert batch == "batch" and counts and made == [(4, 5)] * moments
        return (weight * torch.rand_like(weight)).sum(), {}
    monkeypatch.setattr(torch, "empty_like", counted)
    opt, state = kind([weight]), torch.get_rng_state()
    train.try_row("batch", forward, opt)
    assert weight.grad is None and not opt.state and torch.equal(torch.get_rng_state(), state)


def test_a_row_that_does_not_fit_names_the_options_that_take_less(capsys, monkeypatch):
    full = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(torch.OutOfMemoryError) as stop:
        train.try_row(None, full, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
    for program, advised in (("train.py", True), ("sample.py", False)):
        monkeypatch.setattr(sys, "argv", [f"somewhere/{program}"])
        sample.explain(stop.type, stop.value, None)
        said = capsys.readouterr().err
        assert "Tried to allocate 2 GiB" in said and ("checkpoint_activations" in said) == advised


LORA = ["--lora_rank=3", "--eval_interval=3"]


def test_adapters_have_ten_times_the_rate():
    for options, rate in (([], 5e-5), (["--learning_rate=1e-6"], 1e-6)):
        run = train.configure(["--lora_rank=4", "--data=hh", "--init_from=x", "--out_dir=x", *options])
        assert run["learning_rate"] == approx(rate)


def test_adapters_are_trained_saved_merged_and_resumed(runs):
    """state.pt holds only them; the directory is an ordinary model; the reference is the model without them."""
    options = [*LORA, "--dtype=bfloat16", "--optimizer=adamw"]
    trained("lora-whole", *options, "--max_steps=4")
    trained("lora", *options, "--max_steps=2")
    resumed("lora", "--max_steps=4")
    same_run("lora-whole", "lora")
    first, state = log_of("lora")[0], state_of("lora")
    assert first["eval_kl_l"] == first["eval_kl_w"] == 0 and first["eval_loss"] == approx(math.log(2))
    assert steps_of("lora")[-1]["kl_l"] > 1e-4
    start, merged = sample.load_model("sft")[0], sample.load_model("lora")[0]
    ids = torch.arange(40)[None]
    train.adapt(start, 3, low=True)
    plain = start(ids).logits
    assert sorted(state["weights"]) == sorted(n for n, p in start.named_parameters() if p.requires_grad)
    start.load_state_dict(state["weights"], strict=False)
    assert torch.allclose(start(ids).logits, merged(ids).logits, atol=1e-5)
    assert not torch.allclose(plain, merged(ids).logits, atol=1e-3)
    assert merged.dtype == torch.float32 and merged.transformer.wte.weight.equal(start.transformer.wte.weight)

    # the weights that they were put on are not in state.pt, but they have to be the same
    shutil.copytree("sft", "base")
    trained("moved", *LORA, "--init_from=base", "--ref_from=sft", "--max_steps=1")
    start = sample.load_model("base")[0]
    start.transformer.h[0].mlp.c_fc.weight.data += 0.1
    start.save_pretrained("base")
    says(1, "the data or the model that the run", "train.py", "--resume=True", "--out_dir=moved", "--max_steps=4")


def test_adapters_of_other_names_are_not_dropped(runs):
    """As of a different version of transformers."""
    trained("renamed", *LORA, "--max_steps=1")
    state = state_of("renamed")
    state["weights"] = {name.replace("transformer.", "model."): x for name, x in state["weights"].items()}
    torch.save(state, "renamed/state.pt")
    before = contents("renamed")
    fails("Unexpected key.*model.h.0", "train.py", "--resume=True", "--out_dir=renamed", "--max_steps=4")
    assert contents("renamed") == before


# an indexer chooses what a token attends to, and no gradient goes through the choice
SPARSE = dict(
    intermediate_size=48, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8, index_topk=128, index_head_dim=16, index_n_heads=2, moe_intermediate_size=24,
    n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=1)


@pytest.mark.parametrize("options", (["--optimizer=adamw"], LORA))
def test_parameters_that_no_gradient_reaches_do_not_stop_a_resumed_run(runs, words, options):
    """They keep their values; where the state of a parameter is lost, the run is refused."""
    config = hf.GlmMoeDsaConfig(**dict(SIZES, vocab_size=len(words), eos_token_id=0), **SPARSE)
    save_with_words(tiny(config), "sparse")
    name, options = "sparse-" + "".join(options), ["--init_from=sparse", "--eval_interval=0", *options]
    trained(name + "whole", *options, "--max_steps=2")
    trained(name, *options, "--max_steps=1")
    state = state_of(name)
    before, after = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in ("sparse", name))
    same = {x for x in before if torch.equal(before[x], after[x])}
    assert {x for x in before if ".indexer." in x} <= same and len(same) < len(before)
    if "--optimizer=adamw" in options:
        shutil.copytree(name, "lost-state")
        state["optimizer"]["state"].popitem()
        torch.save(state, "lost-state/state.pt")
        fails("Missing optimizer state", "train.py", "--resume=True", "--out_dir=lost-state", "--max_steps=2")
    resumed(name, "--max_steps=2")
    same_run(name + "whole", name)


def test_adapters_go_on_the_layers_of_the_text_model():
    text = dict(SIZES, **GROUPS, head_dim=8, vocab_size_per_layer_input=61, hidden_size_per_layer_input=8)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                  num_key_value_heads=4, head_dim=8, position_embedding_size=16)
    model = tiny(hf.Gemma4Config(text_config=text, vision_config=vision))
    layers = adapted(model)
    assert len(layers) > 10 and all(".language_model.layers." in name for name in layers)
    model(torch.arange(9)[None]).logits.sum().backward()
    assert all(x.grad is not None for adapter in layers.values() for x in (adapter.A, adapter.B))


# ---------------------------------------------------------------------------------------------------------------------
# text to tokens


TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}")
GOOD = '{"prompt": "the plot", "chosen": " was warm", "rejected": " was dull"}'


@pytest.fixture
def words():
    return eval_imdb.scratch_model(0)[1]


def write_lines(path, rows):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return str(path)


def lines_of(path):
    return [json.loads(line) for line in open(path)]


SPECIAL = ["<s>", "</s>", "<im>", "<end>", "<think>"]
CHAT = ("{{ bos_token }}{% for m in messages %}<im>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<im>assistant\n{% endif %}")
CALLS = "{% for t in tools or [] %}{{ t.name }};{% endfor %}" + CHAT.replace(
    "<end>", "{% for c in m.tool_calls or [] %}[{{ c.name }}]{% endfor %}<end>")
THINK = CHAT.replace("m.content", "m.content.split('</think>')[-1]").replace("assistant\n{%", "assistant\n<think>{%")
# knows two roles, and the arguments of calls
KNOWN = CHAT.replace("<im>", "{% if m.role in ['user', 'assistant'] %}<im>", 1).replace(
    "<end>\n", "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<end>\n{% endif %}", 1)
DATED = "{{ strftime_now('%Y-%m-%d') }} " + CHAT


def spelled(eos="</s>", bos=None, adds=(), space=False, template=None):
    """A tokenizer whose tokens are characters and SPECIAL. adds: what it puts around every text by itself; space: it
    puts a space token before every piece of text, as Llama 2's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    letters = [*SPECIAL, "\u2581", "\n", *map(chr, range(32, 127)), "\n\n", "nk"]
    merges = [("\n", "\n"), ("n", "k")]
    inner = Tokenizer(models.BPE({c: n for n, c in enumerate(letters)}, merges, unk_token="<s>"))
    if space:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    inner.add_special_tokens(SPECIAL)
    if adds:
        ids = [(x, SPECIAL.index(x)) for x in adds if x != "$A"]
        inner.post_processor = processors.TemplateProcessing(single=" ".join(adds), special_tokens=ids)
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, bos_token=bos, chat_template=template)


def read(rows, tokenizer, source="rows", known=None, **options):
    """(examples, counts) that train.py makes of rows, or of a file's, for a model that knows so many tokens, with these
    options. The examples have lists of tokens."""
    run = dict(method="tdpo2", bad_rows=0, max_length=500, max_prompt_length=400)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**dict(GPT, vocab_size=known or len(tokenizer))))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    rows = train.read_rows(rows) if isinstance(rows, str) else [(f"row {n}", row) for n, row in enumerate(rows, 1)]
    with mock.patch.multiple(train, **{**run, **options}):
        examples, counts = train.make_examples(rows, source, model, tokenizer)
    assert all(x.dtype == np.int32 for example in examples for x in example[2:5])
    lists = []
    for example in examples:
        plain = example_of(*[x.tolist() for x in example[2:5]], *example[:2])
        lists.append(plain._replace(asked=example.asked))
    return lists, counts


def turns(*contents):
    """Messages, from the user and the assistant in turn; a dict stands for itself."""
    roles = ["user", "assistant"] * len(contents)
    return [x if isinstance(x, dict) else dict(role=role, content=x) for role, x in zip(roles, contents)]


def answer(text, **more):
    return [dict(role="assistant", content=text, **more)]


def pair_of(prompt="q", chosen="y", rejected="n", **more):
    """A row of text."""
    return dict(prompt=prompt, chosen=chosen, rejected=rejected, **more)


def chat_of(prompt="q", chosen="y", rejected="n", **more):
    """A row of messages. A text stands for one message, of the user in the prompt, of the assistant in responses."""
    row = pair_of(prompt, chosen, rejected, **more)
    for name, value in row.items():
        if isinstance(value, str):
            if name == "prompt":
                row[name] = turns(value)
            if name in ("chosen", "rejected"):
                row[name] = answer(value)
    return row


ASKED, SYSTEM = "<s><im>user\nq<end>\n<im>assistant\n", dict(role="system", content="be")
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
PLAIN, CHATS, TOOL = dict(), dict(eos="<end>", bos="<s>", template=CHAT), dict(eos="<end>", bos="<s>", template=CALLS)
PARTS = [dict(type="text", text="y"), dict(type="text", text="es")]
# (tokenizer, row, what is trained: prompt, chosen, rejected, as text with its special tokens)
READ = {
    "text": (PLAIN, pair_of("q", " y", " n"), "q", " y</s>", " n</s>"),
    "transcripts": (PLAIN, dict(chosen=HH + " y", rejected=HH + " n"), HH, " y</s>", " n</s>"),
    "an empty prompt": (PLAIN, pair_of(""), "</s>", "y</s>", "n</s>"),
    "other columns": (PLAIN, pair_of(score=1, id="x", tools="[]", images=[], system="", history=None, messages="y"),
                      "q", "y</s>", "n</s>"),
    "messages": (CHATS, chat_of(messages=turns("q")), ASKED, "y<end>", "n<end>"),
    "a prompt that is text": (CHATS, dict(chat_of(), prompt="q"), ASKED, "y<end>", "n<end>"),
    "whole conversations": (CHATS, pair_of("q", turns("q", "y"), turns("q", "n")), ASKED, "y<end>", "n<end>"),
    "what a table fills up with": (CHATS, pair_of(
        "", turns("q", *answer("y", tool_calls=[], reasoning_content="", name=None)), turns("q", "n"), messages=None,
        tools=[]), ASKED, "y<end>", "n<end>"),
    "a greeting": (PLAIN, pair_of("Hi", "Hi!", "Hi you"), "Hi", "Hi!</s>", "Hi you</s>"),
    "parts of text": (CHATS, chat_of(chosen=answer(PARTS)), ASKED, "yes<end>", "n<end>"),
    "a system column": (CHATS, chat_of(system="be"), "<s><im>system\nbe<end>\n" + ASKED[3:], "y<end>", "n<end>"),
    "tools": (TOOL, chat_of(chosen=answer(None, tool_calls=[dict(name="t")]), tools=[dict(name="t", default=None)]),
              "t;" + ASKED, "[t]<end>", "n<end>"),
    "EOS that a text spells": (PLAIN, pair_of("q", "a</s>b", "n</s></s>\n"), "q", "a</s>b</s>", "n</s>"),
    "EOS that a message spells": (CHATS, chat_of("q", "a<end>b", "n<end>"), ASKED, "a<end>b<end>", "n<end>"),
    "a turn that EOS does not end": (dict(CHATS, eos="</s>"), chat_of("q", "a</s>b"), ASKED, "a</s>b<end>\n</s>",
                                     "n<end>\n</s>"),
    "EOS that closes the prompt": (PLAIN, pair_of("q</s>"), "q</s>", "y</s>", "n</s>"),
    "EOS that the tokenizer adds": (dict(adds=("<s>", "$A", "</s>"), bos="<s>"), pair_of(), "<s>q", "y</s>", "n</s>"),
    "BOS that the template writes": (dict(CHATS, adds=("<s>", "$A")), chat_of(), ASKED, "y<end>", "n<end>"),
    "a thinking block that is opened": (dict(CHATS, template=THINK), chat_of(), ASKED, "y<end>", "n<end>"),
    "a block that is no token": (dict(CHATS, template=THINK.replace("<think>", "<thought>")),
                                 chat_of("q", "<table>", "<tr>"), ASKED, "<table><end>", "<tr><end>"),
    "space before every text": (dict(space=True), pair_of("a b", " y", " n"), "a b", " y</s>", " n</s>"),
    "space before every turn": (dict(CHATS, space=True), chat_of(), ASKED, "y<end>", "n<end>"),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_trained_is_what_was_meant(name):
    """The right tokens are those of the whole text, spelled by hand, in the tokenizer's own words."""
    options, row, prompt, *responses = READ[name]
    tokenizer = spelled(**options)
    (found,), counts = read([row], tokenizer)
    assert found.prompt == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for response, tokens in zip(responses, (found.chosen, found.rejected)):
        assert found.prompt + tokens == tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
    assert counts["shortened"] == ("<th" in options.get("template", ""))


@pytest.mark.parametrize("space, prompt, chosen", [(False, "a\n", "\ny"), (False, "ban", "k of"),
                                                   (True, "ban", "k of")])
def test_a_token_across_the_border_loses_and_adds_nothing(space, prompt, chosen):
    tokenizer = spelled(space=space)
    (found,), _ = read([pair_of(prompt, chosen)], tokenizer)
    assert found.prompt == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(found.prompt + found.chosen).strip(" ") == prompt + chosen + "</s>"


ALIKE = pair_of("q", "y", "y")
CALL = [dict(name="t")]


TEMPLATED = dict(CHATS, template=KNOWN)


# rows that are not trained: (tokenizer, row, the reason)
BAD = [
    (PLAIN, dict(prompt="q", chosen="y"), "no text in 'rejected', nor messages in all of"),
    (PLAIN, pair_of(rejected=" "), "an empty 'rejected'"),
    (PLAIN, ALIKE, "identical responses"),
    (PLAIN, pair_of("q", "y</s>", "y"), "identical responses"),
    (PLAIN, dict(chosen=HH + " a\n\nHuman: b\n\nAssistant: c", rejected=HH + " n"), "differ before the last assistant"),
    (PLAIN, pair_of(history=[["a", "b"]]), "has 'history', which is not read"),
    (PLAIN, pair_of(messages=turns("a", "b")), "has 'messages', which is not read"),
    (PLAIN, pair_of(system="be"), "has 'system' beside text"),
    (PLAIN, pair_of(tools='[{"name": "t"}]'), "has 'tools' beside text"),
    (PLAIN, pair_of("now say it", "now say it y", "now say it n"), "repeat the prompt"),
    (PLAIN, pair_of("hi", "y\n\nHuman: so?\n\nAssistant: y"), "a turn of the human in a resp"),
    (PLAIN, pair_of("q", "[{'role': 'user', 'content': 'q'}]", "[{'role': ..."), "written as text"),
    (PLAIN, pair_of(turns("q")), "no text in 'prompt', nor messages in all of"),
    (dict(adds=("<s>", "$A")), pair_of("q", "y<new>"), "does not know: 104 of 104"),
    (CHATS, chat_of("q", turns("q", "y"), turns("q", "n")), "repeat the prompt's messages"),
    (CHATS, chat_of([SYSTEM, *turns("q")], turns("q", "y"), turns("q", "n")), "repeat the"),
    (CHATS, dict(chosen=answer("y"), rejected=answer("n")), "has no prompt before its answers"),
    (CHATS, pair_of("other", turns("q", "y"), turns("q", "n")), "none of its messages"),
    (CHATS, dict(chosen=[], rejected=[]), "identical or empty"),
    (CHATS, dict(chosen=turns("q", "y"), rejected=turns("q", "y")), "identical or empty"),
    (CHATS, dict(chosen=turns("q", "y", "a", "b"), rejected=turns("q", "n", "c", "d")), "turns of the assistant, user"),
    (CHATS, dict(chosen=turns("q", "a", "b", "y"), rejected=turns("q", "a", "c", "n")), "turns of the user, assistant"),
    (CHATS, dict(chosen=turns(dict(role="human", content="q"), "y"), rejected=[]), "role 'human': rename it"),
    (CHATS, dict(chosen=[{"from": "gpt", "value": "y"}], rejected=[]), "rename them to role and content"),
    (CHATS, chat_of(turns(None)), "of the user without content"),
    (CHATS, chat_of(turns([dict(type="image")])), "content is not text"),
    (CHATS, chat_of(chosen=answer("y", tool_calls=CALL)), "has tool_calls, but"),
    (CHATS, chat_of(chosen=answer("y", reasoning_content="r")), "has reasoning"),
    (CHATS, chat_of(tools=CALL), "has tools, but the"),
    (CHATS, chat_of(chosen=turns(SYSTEM, "y"), system="no"), "different system"),
    (TEMPLATED, chat_of([SYSTEM, *turns("q")]), "a text of the system that the model's chat template does not print"),
    (TEMPLATED, chat_of(chosen=answer("y", tool_calls=[dict(arguments='{"a": 1}')])), "arguments of a tool call"),
]
@pytest.mark.parametrize("options, row, message", BAD)
def test_bad_rows_say_why(options, row, message):
    tokenizer = spelled(**options)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(SystemExit, match="1 bad rows of 1; 1 x row 1 .*" + re.escape(message)):
        read([row], tokenizer, known=104)


def test_long_pairs_lose_prompt_but_bos_then_the_ends_of_responses():
    row = pair_of("abcdefgh", "12345", "67890")
    for adds, prompt in (((), "efgh"), (("<s>", "$A"), "<s>fgh")):
        tokenizer = spelled(adds=adds, bos="<s>")
        (example,), counts = read([row], tokenizer, max_length=7, max_prompt_length=4)
        assert [tokenizer.decode(x) for x in example[2:5]] == [prompt, "123", "678"]
        assert counts["truncated"] == 1
    with pytest.raises(SystemExit, match="1 bad rows of 1; .* the same within --max_length=3"):
        read([dict(row, rejected="1")], spelled(), max_length=3, max_prompt_length=2)


SFT = [     # (tokenizer, row, prompt, response)
    (PLAIN, dict(prompt="q", completion=" y"), "q", " y</s>"),
    (PLAIN, pair_of("q", " y", ""), "q", " y</s>"),
    (PLAIN, dict(text="whole"), "w", "hole</s>"),
    (dict(adds=("<s>", "$A"), bos="<s>"), dict(text="whole"), "<s>", "whole</s>"),
    (PLAIN, dict(chosen=HH + " y", rejected=HH + " y"), HH, " y</s>"),
    (CHATS, dict(prompt=turns("q"), completion=answer("y")), ASKED, "y<end>"),
    (CHATS, dict(messages=turns("q", "a", "b", "y")), "<s><im>user\nq<end>\n<im>assistant\na<end>\n<im>user\nb<end>\n"
     "<im>assistant\n", "y<end>"),
]


@pytest.mark.parametrize("options, row, prompt, response", SFT)
def test_sft_takes_sft_data(options, row, prompt, response):
    tokenizer = spelled(**options)
    (found,), _ = read([row], tokenizer, method="sft")
    assert [tokenizer.decode(found.prompt), tokenizer.decode(found.chosen), found.rejected] == [prompt, response, []]
    # a text that is learned whole has no prompt to show
    assert found.prompt_text == (None if "text" in row else prompt)
    with pytest.raises(SystemExit, match="turns of the user after the shared prompt"):
        read([dict(messages=turns("q", "y", "r"))], spelled(**CHATS), method="sft")


def test_a_label_that_is_false_is_not_learned():
    """As JSON and CSV have it. 0 may be the label of a class."""
    for label in (False, "False", " false"):
        with pytest.raises(SystemExit, match="has the label false"):
            read([dict(prompt="q", completion="y", label=label)], spelled(), method="sft")
    assert read([dict(text="a review", label=0)], spelled(), method="sft")[0]


def held_prompts_of(folder):
    return {str(row["prompt"]) for row in lines_of(folder + "/prompts.jsonl")}


def places(asked, seed=1):
    """The places of what prompts ask between 0 and 1, by which they are held out."""
    digests = [hashlib.sha256(json.dumps([seed, x]).encode()).hexdigest() for x in asked]
    return [int(x[:16], 16) / 2**64 for x in digests]


def held_of(rows, tokenizer, **options):
    """What the prompts of rows ask that are held out."""
    examples, counts = read(rows, tokenizer, **options)
    with mock.patch.multiple(train, eval_pairs=512, seed=1):
        _, held = train.hold_out(examples, counts["read"])
    return {example.asked for example in held}


@pytest.mark.parametrize("prompts, n, eval_pairs", [(40, 100, 5), (100, 100, 512), (3, 90, 10), (2, 2, 1),
                                                    (2000, 2000, 40), (1000, 1000, 100)])
def test_a_hash_holds_out_a_share_of_the_prompts(prompts, n, eval_pairs):
    """Of prompts with many pairs, with one, and with more than may be held out: all of a prompt's pairs or none."""
    pairs = [example_of([k], [1], [2], f"row {k}")._replace(asked=f"prompt {k % prompts}") for k in range(n)]
    with mock.patch.multiple(train, eval_pairs=eval_pairs, seed=1):
        rest, held = train.hold_out(pairs, n)
        others, again = train.hold_out(pairs[::-1], n)
    assert sorted(rest + held) == sorted(pairs) == sorted(others + again) and rest and held
    found = [x.asked for x in held]
    assert not {x.asked for x in rest} & set(found) and set(found) == {x.asked for x in again}
    # the largest of 1/10, 1/20 ... of which at most eval_pairs are expected
    share = next(x for x in (0.1 / 2**k for k in range(99)) if x * n <= eval_pairs)
    asked = [f"prompt {k}" for k in range(prompts)]
    chosen = {x for x, place in zip(asked, places(asked)) if place < share}
    assert set(found) == (chosen or {min(asked, key=lambda x: places([x]))})
    assert places(found) == sorted(places(found))


def test_the_same_prompts_are_held_out_whatever_becomes_of_rows():
    """SFT and TDPO, of files with ties, in a different order, with more rows, truncated, and of chats whose template
    prints a date or leaves out a thinking block."""
    prompts = [f"{n} is the number" for n in range(80)]
    plain = [pair_of(x, f" good {n}", " bad") for n, x in enumerate(prompts)]
    ties = [dict(row, rejected=row["chosen"]) if n % 9 == 0 else row for n, row in enumerate(plain)]
    more = [dict(row, prompt="more " + row["prompt"]) for row in plain[:20]]
    held = {x for x, place in zip(prompts, places(prompts)) if place < 0.1}
    assert len(held) > 3
    for rows in (plain, ties, ties[::-1] + plain[:30] + more):
        for method, options in (("sft", {}), ("tdpo2", dict(max_length=12, max_prompt_length=6))):
            found = held_of(rows, spelled(), method=method, bad_rows=0.5, **options)
            left = {row["prompt"] for row in rows if method == "sft" or row["chosen"] != row["rejected"]}
            assert {x for x in found if not x.startswith("more")} == held & left
    chats = [chat_of(**row) for row in plain]
    for template, method in ((DATED, "sft"), (THINK, "sft"), (THINK, "tdpo2"), (CHAT, "tdpo2")):
        assert held_of(chats, spelled(**dict(CHATS, template=template)), method=method) == held


def test_pairs_beyond_eval_pairs_are_counted(runs):
    """Of a prompt's twenty pairs, of which three are evaluated."""
    rows = [pair_of(f"the plot {n % 4}", f" was good {n}", " was bad") for n in range(80)]
    options = ["--data=" + write_lines("beyond.jsonl", rows), "--eval_pairs=3", "--max_steps=1"]
    said = "note: 17 held-out pairs beyond --eval_pairs are not evaluated"
    out = says(0, said, "train.py", *on_pairs("beyond", *options))
    assert "data: 80 pairs read = 60 to train on + 20 held out + 0 left out" in out
    assert log_of("beyond")[0]["eval_pairs"] == 3


PRINTED = ("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHAT).replace(
    "<end>", "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<end>")


def test_a_null_stays_if_it_was_written_and_goes_if_a_table_put_it_there(tmp_path):
    """In JSON lines, in a list, and in a directory, where datasets keeps arguments of several kinds as JSON."""
    from datasets import Dataset

    def call(**arguments):
        return answer("", tool_calls=[dict(name="t", arguments=arguments)], name=None)
    rows = [chat_of(chosen=call(town="B", day=None), system=None, tools=[dict(name="t", default=None)]),
            chat_of(chosen=call(n=[1, None]), tools=[dict(name="t")])]
    (tmp_path / "folder").mkdir()
    (tmp_path / "b.json").write_text(json.dumps(rows))
    path = write_lines(tmp_path / "folder" / "a.jsonl", rows)
    tokenizer = spelled(**dict(CHATS, template=PRINTED))
    town, n = '{"name": "t", "arguments": {"town": "B", "day": null}}', '{"name": "t", "arguments": {"n": [1, null]}}'
    for source in (path, str(tmp_path / "b.json"), str(tmp_path / "folder")):
        first, second = read(source, tokenizer)[0]
        assert tokenizer.decode(first.prompt) == '{"name": "t", "default": null}' + ASKED
        assert [tokenizer.decode(x.chosen) for x in (first, second)] == [town + "<end>", n + "<end>"]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    first, second = read(str(tmp_path / "a.parquet"), tokenizer)[0]
    assert tokenizer.decode(first.chosen) == town.replace(', "day": null', "") + "<end>"
    assert tokenizer.decode(second.chosen) == n + "<end>"
    # and of prompts to sample
    path = write_lines(tmp_path / "c.jsonl", [dict(prompt=turns("q") + rows[0]["chosen"])])
    ((_, row),) = sample.read_prompts(path)
    assert '"day": null' in sample.prompt_text(tokenizer, "here", row)


def test_nan_is_an_empty_cell_of_a_row(tmp_path):
    """As json.dumps writes the empty cells of a table, and as they are in one."""
    from datasets import Dataset
    empty = dict.fromkeys(("system", "tools", "history", "images", "messages"), math.nan)
    for options, row in ((PLAIN, pair_of()), (CHATS, chat_of(chosen=answer("y", name=math.nan)))):
        path = write_lines(tmp_path / "a.jsonl", [row, dict(row, score=math.inf, **empty)])
        assert "NaN" in open(path).read() and "Infinity" in open(path).read()
        (a, b), _ = read(path, spelled(**options))
        Dataset.from_list([dict(row, **empty)]).to_parquet(tmp_path / "a.parquet")
        (c,), _ = read(str(tmp_path / "a.parquet"), spelled(**options))
        assert a[1:] == b[1:] == c[1:]
        (_, a), (_, b) = sample.read_prompts(path)
        assert sample.prompt_text(spelled(**options), "here", a) == sample.prompt_text(spelled(**options), "here", b)
        assert b["score"] == math.inf
    with pytest.raises(SystemExit, match="1 bad rows of 1; .*has no text in 'chosen'"):
        read(write_lines(tmp_path / "a.jsonl", [pair_of(chosen=math.nan)]), spelled())


def test_bad_rows_are_counted_by_reason(tmp_path, capsys):
    good = pair_of()
    path = write_lines(tmp_path / "pairs.jsonl", [good] * 300 + ["{", "", "{}", "[]", ALIKE, ALIKE] + [good] * 6)
    examples, counts = read(path, spelled(), path, bad_rows=0.02)
    assert len(examples) == 306 and examples[-1].where.endswith("line 312")
    assert (counts["read"], counts["left out"]) == (311, 5)
    said = "5 bad rows of 311; 2 x .*line 305 has identical responses; 1 x .*line 301 is not JSON.*; 1 x .*line 303 has"
    assert re.search(said, capsys.readouterr().out)
    with pytest.raises(SystemExit, match=said):
        read(path, spelled(), path, bad_rows=0.01)


@pytest.fixture
def sources(tmp_path):
    """A folder with the same five rows in every form that is read."""
    import datasets
    rows = [pair_of(f"q{n}", ["None", "007", "a\nb", "NA", "é"][n]) for n in range(5)]
    table = datasets.Dataset.from_list(rows)
    with contextlib.chdir(tmp_path):
        write_lines("a.jsonl", rows)
        shutil.copy("a.jsonl", "UPPER.JSONL")
        shutil.copy("a.jsonl", "lines.json")
        gzip.open("a.jsonl.gz", "wb").write(open("a.jsonl", "rb").read())
        pathlib.Path("list.json").write_text(json.dumps(rows, indent=1))
        table.to_csv("a.csv")
        table.to_parquet("a.parquet")
        for n in range(2):
            table.shard(2, n, contiguous=True).to_parquet(f"shards/train-{n}.parquet")
        table.save_to_disk("saved")
        datasets.DatasetDict(train=table, other=table).save_to_disk("dict")
        splits = "- config_name: default\n  data_files:\n"
        splits += "".join(f"  - {{split: {name}, path: a.jsonl}}\n" for name in ("train", "other"))
        configs = "".join(f"- {{config_name: {name}, data_files: a.jsonl}}\n" for name in ("one", "two"))
        for name, card in dict(splits=splits, configs=configs).items():
            os.mkdir(name)
            shutil.copy("a.jsonl", name)
            write_lines(name + "/README.md", [f"---\nconfigs:\n{card}---"])
    return tmp_path, rows


SOURCES = ["a.jsonl", "UPPER.JSONL", "a.jsonl.gz", "list.json", "lines.json", "a.csv", "a.parquet", "shards/*.parquet",
           "shards", "saved", "dict", "splits", "configs"]


UNREADABLE = [      # (source, split, what the message says)
    ("nowhere.jsonl", "", "No such file"), ("shards/*.csv", "", "No such file"), ("a.other", "", "it is no .jsonl"),
    ("a.jsonl", "test", "it has no splits"), ("saved", "test", "it has no splits"), ("one.json", "", "one object"),
    ("dict", "test", r"\['train', 'other'\].*--data_split"), ("splits", "test", r"\['train', 'other'\].*--data_split"),
    ("configs", "", r"\['one', 'two'\].*--data_config"), ("tables", "", r"name the files, as in tables/data/\*.csv"),
]


def test_all_forms_of_a_source_hold_the_same_rows(sources, monkeypatch):
    folder, rows = sources
    monkeypatch.chdir(folder)
    for form in SOURCES:
        config = "two" if form == "configs" else ""
        assert [row for _, row in train.read_rows(form, config=config)] == rows, form
    for form in ("dict", "splits"):
        assert [row for _, row in train.read_rows(form, "other")] == rows
    os.makedirs("tables/data")
    shutil.copy("a.csv", "tables/data/a.csv.gz")
    write_lines("one.json", [dict(data=rows)])
    for source, split, said in UNREADABLE:
        with pytest.raises(SystemExit, match=f"cannot read {re.escape(source)}: .*{said}"):
            train.read_rows(source, split)
    write_lines("comma.csv", ["prompt,chosen,rejected", "q,y, and more,n", "q,y,n"])
    assert "more cells than there are columns" in str(train.read_rows("comma.csv")[0][1])


def bytes_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    inner = Tokenizer(models.BPE({c: n for n, c in enumerate(["<eos>", *pre_tokenizers.ByteLevel.alphabet()])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def test_odd_texts_survive(tmp_path):
    """In a tokenizer whose tokens are bytes: control characters, long lines, beginnings cut inside a character."""
    tokenizer = bytes_tokenizer()
    odd = "\0\x1b[31m\u202e\t😀é" * 3
    rows = [pair_of("", odd, "a"), pair_of(odd, odd, "b"), pair_of("x" * 300_000, odd, "c" * 300_000)]
    path = write_lines(tmp_path / "odd.jsonl", rows)
    examples, _ = read(path, tokenizer, max_length=64, max_prompt_length=16)
    assert [len(example.prompt) for example in examples] == [1, 16, 16]
    assert odd.startswith(tokenizer.decode(examples[2].chosen).rstrip("\ufffd"))
    smile = tokenizer("😀é")["input_ids"]
    assert sample.response_text(tokenizer, smile[:2], smile[2:]) == "é"
    prefixes = eval_imdb.task_prefixes({"train": ["😀" * 9] * 40, "test": []}, tokenizer, 1, 40, 40)
    assert all(x and "\ufffd" not in x for x in prefixes["train"])


def test_texts_of_ones_own(words, tmp_path):
    """In a file with a column split, in a table without it, and in a directory; rows without a text are left out."""
    from datasets import Dataset
    rows = [dict(text=f"the plot was<br />dull and number {n}", split="train" if n % 2 else "test") for n in range(6)]
    path = write_lines(tmp_path / "texts.jsonl", [*rows, dict(text=None, split="train"), dict(text="a", split="dev")])
    texts = eval_imdb.load_texts("imdb", path)
    for split, numbers in (("train", (1, 3, 5)), ("test", (0, 2, 4))):
        assert sorted(texts[split]) == [f"the plot was dull and number {n}" for n in numbers]
    prefixes = eval_imdb.task_prefixes(texts, words, 1, 9, 2)
    assert len(prefixes["train"]) == 3 and len(prefixes["test"]) == 2 and prefixes["train"][0].startswith("the plot")
    for row, said in ((rows[0], "has no text in its train split"), ("{broken", "cannot read the texts in .*JSON")):
        with pytest.raises(SystemExit, match=said):
            eval_imdb.load_texts("imdb", write_lines(path, [row]))

    table = Dataset.from_dict(dict(text=[None, " ", *(f"text {n}" for n in range(18))]))
    os.mkdir(tmp_path / "folder")
    for name in ("texts", "folder/train", "folder/test"):
        table.to_parquet(tmp_path / f"{name}.parquet")
    texts = eval_imdb.load_texts("imdb", str(tmp_path / "texts.parquet"))
    assert sorted(texts["test"]) == ["text 17", "text 7"] and len(texts["train"]) == 16
    texts = eval_imdb.load_texts("imdb", str(tmp_path / "folder"))
    assert sorted(texts["train"]) == sorted(texts["test"]) == sorted(table["text"][2:])


def test_generation_is_seeded_and_stops_at_eos(words):
    model, prompts = eval_imdb.scratch_model(0)[0], [words(x)["input_ids"] for x in ("the plot", "i saw this film")]
    a, b = (sample.generate(model, words, prompts, 12, 100, seed=seed) for seed in (1, 2))
    model.generation_config.repetition_penalty = 3.0        # a model's own sampling habits are not the policy
    assert a == sample.generate(model, words, prompts, 12, 100, seed=1) != b and [len(x) for x in a] == [100, 100]
    assert model.generation_config.repetition_penalty == 3.0
    assert all(0 not in r[:-1] and (len(r) == 12 or r[-1] == 0) for r in a[0] + a[1]) and min(map(len, a[0])) < 12


def test_responses_are_measured_as_defined():
    model, other = eval_imdb.scratch_model(0)[0], eval_imdb.scratch_model(1)[0]
    prompts, responses = [[5, 6], [7, 8, 9]], [[10, 11, 12, 13], [14, 0]]
    stats = sample.response_stats(sample.measure(model, other, prompts, responses))
    for i, response in enumerate(responses):
        ids, n = torch.tensor([prompts[i] + response]), len(response)
        p, q = (m(ids).logits[0, -n - 1:-1].double().log_softmax(-1) for m in (model, other))
        expected = [-(p.exp() * p).sum(-1).mean(), -p[range(n), response].mean(), (q.exp() * (q - p)).sum(),
                    (p.exp() * (p - q)).sum()]
        for name, value in zip(("entropy", "surprisal", "kl", "rkl"), expected):
            assert stats[name][i] == approx(value.item(), rel=1e-3), name


def test_prompts_are_lines_of_json_or_of_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [dict(prompt="q"), dict(prompt=turns("q"))]
    write_lines("a.jsonl", ["\ufeff" + json.dumps(rows[0]), "", rows[1]])
    write_lines("a.txt", ["q", "{broken", " "])
    assert sample.read_prompts("a.jsonl") == [("a.jsonl line 1", rows[0]), ("a.jsonl line 3", rows[1])]
    assert sample.read_prompts("a.txt") == [(f"a.txt line {n}", dict(prompt=x)) for n, x in ((1, "q"), (2, "{broken"))]
    pathlib.Path("latin.txt").write_bytes("q\né".encode("latin1"))
    write_lines("broken.jsonl", [rows[0], "{broken"])
    write_lines("empty.txt", [])
    for name, said in (("broken.jsonl", "cannot read broken.jsonl, line 2: "), ("latin.txt", "cannot read latin.txt"),
                       ("a.csv", "is not a .jsonl or .txt file"), ("empty.txt", "has no prompts")):
        with pytest.raises(SystemExit, match=f"^error: .*{said}"):
            sample.read_prompts(name)


def test_prompts_are_text_or_messages():
    tokenizer = spelled(**CHATS)
    text, chat = dict(prompt="q"), dict(prompt=turns("q"))
    assert sample.prompt_text(tokenizer, "here", text) == "q"
    assert sample.prompt_text(tokenizer, "here", text, as_chat=True) == ASKED
    assert sample.prompt_text(tokenizer, "here", chat) == ASKED
    assert "<im>system\nbe<end>" in sample.prompt_text(tokenizer, "here", dict(chat, system="be", tools=None))
    assert sample.prompt_text(tokenizer, "here", dict(prompt=[SYSTEM, *turns("q")], system="be")).count("be<end>") == 1
    assert sample.prompt_text(tokenizer, "here", dict(chat, system=" ", tools="")) == ASKED
    human, system = dict(prompt=[dict(role="human", content="q")]), dict(prompt=[SYSTEM, *turns("q")])
    for row, said in ((dict(text="q"), 'has no "prompt"'), (dict(text, tools=[1]), "has system or tools beside text"),
                      (human, "has a message of the role 'human'"), (dict(prompt="\ud800"), ".*surrogates"),
                      (dict(text, history=["a"]), "has 'history', which is not read"),
                      (dict(text, messages=turns("q", "y")), "has 'messages', which is not read"),
                      (dict(prompt=str(turns("q"))), "has messages written as text"),
                      (dict(system, system="no"), "has a system column and a different system message"),
                      (dict(chat, tools=CALL), "has tools, but the model's chat template does not print them")):
        with pytest.raises(SystemExit, match="error: here " + said):
            sample.prompt_text(tokenizer, "here", row)
    with pytest.raises(SystemExit, match="no chat template"):
        sample.prompt_text(spelled(), "here", chat)
    with pytest.raises(SystemExit, match="error: here has a text of the system that the model's chat template"):
        sample.prompt_text(spelled(**TEMPLATED), "here", system)
    with pytest.raises(SystemExit, match="has messages written as text"):
        sample.prompt_text(tokenizer, "here", dict(prompt=str(turns("q"))), as_chat=True)
    # a row of training
    row = dict(text, chosen=turns("q", "y"), rejected=turns("q", "n"), messages=turns("q", "y"))
    assert sample.prompt_text(tokenizer, "here", row) == "q"
    tools = dict(chat, tools='[{"name": "t"}]')
    assert sample.prompt_text(spelled(**TOOL), "here", tools) == "t;" + ASKED


def test_the_reference_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own/folder").mkdir(parents=True)
    here = str(tmp_path / "own/folder")
    for options, expected in (({}, ""), ([], ""), (dict(method="sft", init_from="own/a"), ""),
                              (dict(method="dpo", init_from="own/a"), "own/a"),
                              (dict(method="dpo", init_from="own/a", ref_from="own/b"), "own/b"),
                              # a hub id, and the folder that was meant
                              (dict(method="dpo", init_from="own/folder"), ""),
                              (dict(method="dpo", init_from=here), here)):
        write_lines(tmp_path / "options.json", [options])
        assert sample.reference_of(str(tmp_path)) == expected
    assert sample.reference_of(f"{tmp_path}/nowhere") == ""


def test_means_have_errors_over_prompts():
    # a ratio of sums over prompts: its linearized standard error
    mean, error = sample.ratio_mean([1.0, 3.0, 2.0, 6.0, 4.0], [1, 2, 1, 1, 5], [0, 0, 1, 1, 2])
    assert mean == approx(3.5)
    assert error == approx(np.std([7 - 3 * mean, 8 - 2 * mean, 20 - 5 * mean], ddof=1) * 3**0.5 / 10)

def test_exact_reward():
    assert eval_imdb.exact_reward(["a dull film", "superb and weak", "superb"]) == [-1, 0, 1]


def test_a_classifier_is_a_reward(words, tmp_path):
    config = hf.GPT2Config(vocab_size=len(words), n_embd=32, n_head=2, n_positions=64, pad_token_id=0)
    model = hf.AutoModelForSequenceClassification.from_config(config).eval()
    words.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="one must be called positive"):
        eval_imdb.load_reward(str(tmp_path))
    model.config.id2label = {0: "NEGATIVE", 1: "POSITIVE"}
    model.save_pretrained(tmp_path)
    reward, texts = eval_imdb.load_reward(str(tmp_path)), ["the plot was dull", "i loved this film and the music", "a"]
    # a text that is longer than its 64 positions is cut there
    texts.append("the plot was dull " * 20)
    ids = [words(x, return_tensors="pt")["input_ids"][:, :64] for x in texts]
    expected = [model(x).logits.softmax(-1)[0, 1].item() for x in ids]
    assert reward(texts) == approx(expected, rel=1e-5) and reward(texts[::-1]) == approx(expected[::-1], rel=1e-5)


def test_pairs_are_of_weights_prefixes_and_options(words, tmp_path, capsys):
    options = dict(folder=str(tmp_path), name="reviews", reward="exact", completions=4, min_score_gap=0.1,
                   max_new_tokens=24, seed=1, prefixes=["the plot was superb", "i saw"], score=eval_imdb.exact_reward)
    model = eval_imdb.scratch_model(0)[0]

    def build(weight=0.0, **changed):
        model.transformer.wte.weight.data[3, 4] += weight
        return eval_imdb.build_pairs(model, words, **{**options, **changed})
    first = build()
    assert os.path.dirname(first) == str(tmp_path) and lines_of(first)
    for row in lines_of(first):
        rewards = eval_imdb.exact_reward([row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]])
        assert [row["chosen_score"], row["rejected_score"]] == rewards and rewards[0] - rewards[1] > 0.1
    assert build() == first and f"reusing {first}" in capsys.readouterr().out
    # a reward model that was trained anew has the same name
    others = {build(prefixes=["the plot"]), build(seed=2), build(max_new_tokens=23), build(weight=1.0),
              build(score=lambda texts: [x + 0.1 for x in eval_imdb.exact_reward(texts)])}
    assert len(others - {first}) == 5
    with pytest.raises(SystemExit, match="every pair was dropped"):
        build(min_score_gap=3)


# ---------------------------------------------------------------------------------------------------------------------
# scripts as users run them, each in a process of its own, in the folder that the fixture `runs` made


# a server imports everything once and forks for each run, which a process that has seen a GPU must not
FORKS = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
FORKS.set_forkserver_preload(["test_tdpo", "matplotlib.pyplot"])


def in_fork(name, args, folder, output, environ, before):
    os.chdir(folder)
    for fd in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), fd)
    os.environ.update(environ)
    sys.argv = [name, *args]
    # nohup has the tests ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before()
    try:
        runpy.run_path(os.path.join(HERE, name), run_name="__main__")
    except Exception:       # as Python does when a script ends
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def nothing():
    """What most tests change before a script runs."""


class Run:
    """A script in the background. before: a function of this file that is called there first."""
    seconds = 300

    def __init__(self, name, *args, before=nothing, environ={}):
        self.output = tempfile.mkstemp()[1]
        everything = name, args, os.getcwd(), self.output, environ, before
        self.process = FORKS.Process(target=in_fork, args=everything, daemon=True)
        self.process.start()

    def end(self):
        """(exit code, output)"""
        self.process.join(self.seconds)
        self.process.kill()
        self.process.join()
        return self.process.exitcode, open(self.output, errors="replace").read()

    def wait_for(self, what):
        while not what():
            if self.process.exitcode is not None:
                pytest.fail(self.end()[1])
            time.sleep(0.001)


def says(code, message, name, *args, **options):
    """A script ends with this code and message (a regex), and without a traceback. Returns its output."""
    found, out = Run(name, *args, **options).end()
    assert found == code and re.search(message, out) and "Traceback" not in out, out
    return out


def fails(message, name, *args, **options):
    """A script ends with an error that says this (a regex), its own or a library's."""
    found, out = Run(name, *args, **options).end()
    assert found == 1 and re.search(message, out), out


def option_error(function, *args):
    """What argparse says when a function ends the program with its exit code 2."""
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()) as said:
        function(*args)
    assert stop.value.code == 2 and said.getvalue().count("error:") == 1
    return said.getvalue()


def many(count, *args, name="train.py", environ={}, **options):
    """A script on several processes, as torchrun starts them: (exit codes, what each of them said). The first that
    fails ends the others."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environ = dict(WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=port, OMP_NUM_THREADS="1", **environ)
    ranks = []
    for rank in map(str, range(count)):
        ranks.append(Run(name, *args, environ=dict(environ, RANK=rank, LOCAL_RANK=rank), **options))
    while any(run.process.exitcode is None for run in ranks) and not any(run.process.exitcode for run in ranks):
        time.sleep(0.01)
    for run in ranks:
        run.process.terminate()
    ends = [run.end() for run in ranks]
    return [code for code, _ in ends], [out for _, out in ends]


def on_pairs(out_dir, *args):
    """Options of a short run on the file of pairs."""
    return ["--data=pairs.jsonl", "--init_from=sft", "--max_length=64", "--max_prompt_length=16", "--batch_size=8",
            "--warmup_steps=3", "--learning_rate=1e-4", "--save_interval=0", "--max_new_tokens=8",
            f"--out_dir={out_dir}", *args]


def trained(out_dir, *args, **options):
    """The output of a run on the file of pairs."""
    return says(0, "saved " + out_dir, "train.py", *on_pairs(out_dir, *args), **options)


def resuming(out_dir, *args):
    """Options of a run that goes on."""
    return ["--resume=True", f"--out_dir={out_dir}", *args]


def resumed(out_dir, *args, **options):
    return says(0, "saved " + out_dir, "train.py", *resuming(out_dir, *args), **options)


def review_pairs(count):
    rng, rows = random.Random(0), []
    for _ in range(count):
        a, b = (eval_imdb.write_review(rng).split() for _ in range(2))
        rows.append(dict(prompt=" ".join(a[:4]), chosen=" " + " ".join(a[4:24]), rejected=" " + " ".join(b[4:30])))
    return rows


TASK = ["--init_from=sft", "--train_prefixes=48", "--eval_prefixes=24"]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """A folder with sft, an SFT model, tdpo2, a run of the embedded task on it, and pairs.jsonl."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.chdir(folder):
        says(0, "saved sft", "train.py", "--method=sft", "--out_dir=sft", "--max_steps=40", "--batch_size=32",
             "--eval_pairs=32")
        out = says(0, "saved tdpo2", "train.py", *TASK, "--out_dir=tdpo2", "--seed=0", "--max_steps=8",
                   "--batch_size=16", "--eval_interval=4")
        write_lines("tdpo2.txt", [out])
        write_lines("pairs.jsonl", review_pairs(60))
    return folder


@pytest.fixture
def runs(made_once, monkeypatch):
    monkeypatch.chdir(made_once)


log_of = eval_imdb.read_log


def state_of(folder):
    return torch.load(folder + "/state.pt", map_location="cpu", weights_only=True)


def steps_of(folder):
    return [record for record in log_of(folder) if "loss" in record]


def last_step(folder):
    return max((record["step"] for record in log_of(folder)), default=-1)


def same_numbers(a, b):
    assert [list(x) for x in a] == [list(x) for x in b]
    for x, y in zip(a, b):
        for name in set(x) - {"pairs_per_s", "tokens_per_s", "peak_gib"}:
            assert x[name] == approx(y[name], rel=2e-4, abs=2e-6), name


def test_imports_run_downwards():
    """tdpo <- sample <- eval_imdb <- train, and tdpo.py needs only torch."""
    downwards = {"tdpo": set(), "sample": {"tdpo"}, "eval_imdb": {"sample"}, "train": {"tdpo", "sample", "eval_imdb"}}
    for name, below in downwards.items():
        found = set(re.findall(r"^ *(?:from|import) (\w+)", text_of(name + ".py"), re.M))
        assert found & {*downwards, "test_tdpo"} == below
        assert name != "tdpo" or found == {"collections", "torch"}


def test_the_embedded_task_end_to_end(runs):
    log, steps = log_of("tdpo2"), steps_of("tdpo2")
    first, last = log[0], log[-1]
    assert first["eval_loss"] == approx(math.log(2), abs=1e-6) and first["eval_n"] == 24
    assert first["step"] == first["eval_kl_w"] == first["eval_kl_l"] == first["eval_sample_kl"] == 0
    assert [(x["step"], x["lr"]) for x in steps] == [(n, approx(1e-4 * n / 20)) for n in range(1, 9)]
    sides = {f"{name}_{side}" for name in ("logratio", "logp", "kl", "rkl") for side in "wl"}
    metrics = {"loss", "acc", "acc_loss", "margin", "kl_gap", "rkl_gap", *sides}
    assert set(steps[0]) == metrics | set("step epoch grad_norm lr pairs_per_s tokens_per_s peak_gib".split())
    names = {"n", "pairs", *metrics, *eval_imdb.SCORES, *(x + "_se" for x in eval_imdb.SCORES)}
    assert set(last) == {"step", *("eval_" + x for x in names)}
    assert all(math.isfinite(x) for record in log for x in record.values())
    drawn = {name for _, _, x, lines in eval_imdb.PANELS for name in (x, *lines)}
    assert all(any(name in record for record in log) for name in drawn)

    # three prefixes with a completion and a reward of both models, then what comes next
    out = open("tdpo2.txt").read()
    assert out.rstrip().endswith("\nsaved tdpo2 (needs transformers 5) | next: python sample.py --model=tdpo2")
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert os.path.exists("tdpo2/log.png") == drawn == ("wrote tdpo2/log.png" in out)
    shown = re.findall(r"\n(.+)\n  reference +(\S+) \|(.*)\n  policy +(\S+) \|(.*)\n", out)
    assert len(shown) == 3
    for prefix, sft_reward, sft_text, reward, text in shown:
        rewards = eval_imdb.exact_reward([prefix + sft_text, prefix + text])
        assert [float(sft_reward), float(reward)] == approx(rewards, abs=0.006)
    assert AutoModelForCausalLM.from_pretrained("tdpo2").generate(max_new_tokens=4).shape[1] > 1

    # the untrained model spreads over its 163 words
    assert steps_of("sft")[0]["loss"] == approx(math.log(163), rel=0.02)

    # the pairs that it was trained on
    (path,) = glob.glob("reviews-pairs-*")
    prompts = [row["prompt"].split() for row in lines_of(path)]
    assert len(prompts) > 20 and all(2 <= len(words) <= 8 for words in prompts)


def test_a_run_ends_with_answers_to_prompts_that_it_held_out(runs):
    """On data of one's own; a prompt is shown as it was cut for training."""
    out = trained("answers", "--max_steps=1", "--max_length=12", "--max_prompt_length=2", "--max_new_tokens=6")
    texts = [row["prompt"] for row in lines_of("answers/prompts.jsonl")[:3]]
    tokenizer, expected = sample.load_model("sft")[1], ""
    prompts = [sample.encode_prompt(tokenizer, text)[-2:] for text in texts]
    assert all(len(text.split()) == 4 for text in texts)
    drawn = {}
    for role, path in (("reference", "sft"), ("policy", "answers")):
        drawn[role] = sample.generate(sample.load_model(path)[0], tokenizer, prompts, 6, seed=1)
    for n, prompt in enumerate(prompts):
        expected += "\n" + tokenizer.decode(prompt) + "\n"
        for role in drawn:
            expected += f"  {role:9} |{sample.response_text(tokenizer, prompt, drawn[role][n][0])}\n"
    assert expected in out, out


def test_sample_measures_reference_and_policy(runs):
    out = says(0, "over 3 prompts; wrote tdpo2/samples.jsonl\n$", "sample.py", "--model=tdpo2", "--num_prompts=3",
               "--num_samples=2")
    rows, held_out = lines_of("tdpo2/samples.jsonl"), lines_of("tdpo2/prompts.jsonl")
    assert [r["prompt"] for r in rows[::2]] == 2 * [r["prompt"] for r in held_out[:3]]
    for name, part in (("reference", rows[:6]), ("policy", rows[6:])):
        mean = np.average([r["entropy"] for r in part], weights=[r["tokens"] for r in part])
        assert re.search(rf"{name} +\| 6 responses \| entropy {mean:.4f} ± 0\.\d+ \| surprisal .*± ", out)
        assert {r["model"] for r in part} == {name}
        assert all(r["kl"] > 0 for r in part) if name == "policy" else all("kl" not in r for r in part)

    # a model that is no run, with prompts of one's own
    shutil.copytree("sft", "model", ignore=shutil.ignore_patterns("options.json", "log.jsonl", "state.pt"))
    says(2, "not a run that held out prompts", "sample.py", "--model=model")
    write_lines("two.txt", ["the plot", "the " * 200, "i saw"])
    said = "note: 1 of 3 prompts are left out(.|\n)*over 2 prompts"
    says(0, said, "sample.py", "--model=model", "--prompts=two.txt", "--max_new_tokens=5")
    assert [row["prompt"] for row in lines_of("model/samples.jsonl")] == ["the plot", "i saw"]
    says(1, "error: no prompt is left\n", "sample.py", "--model=model", "--prompt=" + "the " * 200)


def test_a_run_is_used_from_elsewhere_and_after_it_was_moved(runs, tmp_path):
    shutil.copytree("sft", tmp_path / "sft")
    shutil.copy("pairs.jsonl", tmp_path)
    (tmp_path / "elsewhere" / "sft").mkdir(parents=True)
    with contextlib.chdir(tmp_path):
        trained("run", "--max_steps=1", "--eval_data=p*.jsonl", "--ref_from=sft")
    sampled = "--model=../run", "--num_prompts=2", "--max_new_tokens=3", "--out=x.jsonl"
    with contextlib.chdir(tmp_path / "elsewhere"):
        says(0, "reference +.*\npolicy .* kl ", "sample.py", *sampled)
        resumed("../run", "--max_steps=2")

        # its models and data are in a different place now, and a model that is not the reference in this one
        os.rename(tmp_path / "sft", tmp_path / "moved")
        os.rename(tmp_path / "pairs.jsonl", tmp_path / "moved.jsonl")
        said = f"note: the run's reference {tmp_path}/sft is gone; --ref=DIR(.|\n)*policy "
        out = says(0, said, "sample.py", *sampled)
        assert "reference  " not in out
        says(0, "reference +.*\npolicy .* kl ", "sample.py", *sampled, "--ref=../moved")
        says(1, f"error: {tmp_path}/sft is gone; name the place", "train.py", *resuming("../run", "--max_steps=3"))
        places = ["--init_from=../moved", "--ref_from=../moved", "--data=../moved.jsonl", "--eval_data=../moved.jsonl"]
        resumed("../run", "--max_steps=3", *places)
        # what lies there has to be the same
        shutil.copytree("../moved", "other")
        model, _ = sample.load_model("other")
        model.transformer.ln_f.weight.data += 1
        model.save_pretrained("other")
        says(1, "the data or the model that the run in ../run began with has changed", "train.py",
             *resuming("../run", "--max_steps=4", *places, "--ref_from=other"))
        write_lines("other.jsonl", lines_of("../moved.jsonl")[1:])
        says(1, "the data or the model that the run in ../run began with has changed", "train.py",
             *resuming("../run", "--max_steps=4", *places[:2], "--data=other.jsonl"))


def test_the_embedded_tasks_model_is_found_from_elsewhere(tmp_path, monkeypatch):
    """It is trained once, with options that exist, and its name is an absolute path."""
    commands = []

    def run(command, **options):
        commands.append(command)
        os.mkdir(train.configure(command[2:])["out_dir"])
        return types.SimpleNamespace(returncode=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(signal, "signal", mock.Mock())
    with mock.patch.multiple(train, create=True, out_dir="run", seed=3, hangup=[]):
        found = [train.embedded_sft() for _ in range(2)]
    assert found == 2 * [str(tmp_path / "reviews-sft-3")] and os.listdir() == ["reviews-sft-3"]
    assert len(commands) == 1 and {"--method=sft", "--seed=3"} < set(commands[0])


def test_a_tilde_is_the_home_directory_in_every_path(runs, monkeypatch):
    home = os.path.abspath("home")
    monkeypatch.setenv("HOME", home)
    os.mkdir("home")
    names = "init_from", "ref_from", "data", "eval_data", "out_dir"
    found = train.configure([f"--{name}=~/{name}/*" for name in names])
    assert [found[name] for name in names] == [f"{home}/{name}/*" for name in names]
    monkeypatch.setattr(train, "ref_from", "~/sft")
    shutil.copytree("sft", "home/sft")
    assert train.configure(["--data=pairs.jsonl", "--init_from=x"])["ref_from"] == home + "/sft"
    monkeypatch.setattr(train, "ref_from", "")
    monkeypatch.setattr(train, "out_dir", "~/runs/a")
    assert train.configure(["--data=pairs.jsonl", "--init_from=x"])["out_dir"] == home + "/runs/a"
    monkeypatch.setattr(train, "out_dir", "")
    tasks = train.configure(["--data=imdb", "--texts=~/texts", "--reward=~/reward", "--init_from=x"])
    assert (tasks["texts"], tasks["reward"]) == (home + "/texts", home + "/reward")
    shutil.copy("tdpo2/prompts.jsonl", "home")
    says(0, "wrote .*/home/x/y.jsonl", "sample.py", "--model=~/sft", "--ref=~/sft", "--prompts=~/prompts.jsonl",
         "--max_new_tokens=3", "--out=~/x/y.jsonl", environ=dict(HOME=home))
    says(0, "home/sft [|]", "eval_imdb.py", "--runs=sft,~/sft", "--out=~/z/figure.png",
         environ=dict(HOME=home))
    assert not os.path.exists("~")
    # a prompt is no path
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompt")
    assert sample.parse(parser, ["--prompt=~/a"]).prompt == "~/a"


def test_table_and_figure_come_from_logs_and_models_are_scored_anew(runs):
    shutil.copytree("tdpo2", "elsewhere", ignore=shutil.ignore_patterns("options.json", "log.jsonl"))
    out = says(0, "wrote|no figure", "eval_imdb.py", "--runs=tdp*2,sft", "--score=elsewhere",
               "--out=frontier.png")
    lines = {line.split(" | ")[0]: line for line in out.splitlines() if line.startswith("| ")}
    assert list(lines) == ["| run", "| tdpo2", "| sft", "| elsewhere (scored)"]
    # the same seed and prefixes: the logged numbers are those that are measured anew
    last = log_of("tdpo2")[-1]
    cells = [f"{last['eval_' + name]:.3f} ± {last[f'eval_{name}_se']:.3f}" for name in eval_imdb.SCORES]
    cells = " | " + " | ".join(cells)
    assert lines["| tdpo2"] == f"| tdpo2{cells} | {last['eval_loss']:.3f} | {last['eval_acc']:.3f} |"
    assert lines["| elsewhere (scored)"] == f"| elsewhere (scored){cells} | – | – |"
    assert lines["| sft"] == f"| sft | – | – | – | – | {log_of('sft')[-1]['eval_loss']:.3f} | – |"
    assert len(re.findall(r"\n.+\n  reference +[+-]\S+ \|.*\n  policy +[+-]\S+ \|.*\n", out)) == 3
    assert os.path.exists("frontier.png") or "no figure was drawn" in out
    # what is wrong is said before anything is scored
    for code, said, *options in ((2, "elsewhere holds no run of train.py", "--runs=elsewhere"),
                                 (1, "cannot load nowhere", "--runs=tdpo2", "--score=tdpo2,nowhere")):
        says(code, said, "eval_imdb.py", *options, "--out=no.png")


# ---------------------------------------------------------------------------------------------------------------------
# resume


def same_run(a, b, exactly=True):
    """Two run directories hold the same weights, optimizer and steps, timing aside."""
    x, y = [state_of(folder) for folder in (a, b)]
    assert x["step"] == y["step"] and x["fingerprint"] == y["fingerprint"] and len(x["optimizer"]["state"]) > 10
    for name, state in x["optimizer"]["state"].items():
        for tensors in ((x["weights"][name], y["weights"][name]),
                        *((state[key], y["optimizer"]["state"][name][key]) for key in state)):
            # where gradients vanish, RMSprop magnifies their rounding
            assert torch.equal(*tensors) if exactly else torch.dist(*tensors) <= 1e-3 * tensors[0].norm() + 1e-9
    same_numbers(steps_of(a), steps_of(b))


def test_resume_needs_only_state_pt_and_continues_bit_for_bit(runs):
    trained("whole", "--max_steps=8", "--eval_interval=2")
    trained("parts", "--max_steps=4", "--eval_interval=2")
    for path in glob.glob("parts/*"):
        if os.path.basename(path) not in ("state.pt", "options.json", "log.jsonl"):
            os.remove(path)
    with open("parts/log.jsonl", "a") as f:             # as a kill leaves it: a step after the save, and half a line
        f.write('{"step": 5, "loss": 9}\n{"step": 99, "lo')
    resumed("parts", "--max_steps=8")
    same_run("whole", "parts")
    same_numbers(log_of("whole"), log_of("parts"))
    a, b = (open(folder + "/model.safetensors", "rb").read() for folder in ("whole", "parts"))
    assert a == b

    # a kill may have come between state.pt and the last of the other files: they come back
    os.remove("parts/model.safetensors")
    says(1, "is at step 8 already", "train.py", *resuming("parts"))
    assert open("parts/model.safetensors", "rb").read() == a


def contents(folder):
    return {str(path): path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()}


OWN = ("notes.md", "results.json", "samples.jsonl", "vocab.tsv", "evals/raters.csv", "tokenizer_notes/merges.md",
       "tokenizer.txt", "additional/x.jinja", "log.jsonl.bak", "data/config.json")


def test_a_run_removes_what_a_run_wrote_and_nothing_else(runs):
    """In a folder with other files, the start model and the data, over one run and the next."""
    for name in OWN:
        os.makedirs(os.path.dirname("study/" + name) or ".", exist_ok=True)
        write_lines("study/" + name, ["mine"])
    shutil.copytree("sft", "study/tokenizer_start")
    shutil.copy("pairs.jsonl", "study/evals.jsonl")
    own = contents("study")
    with contextlib.chdir("study"):
        start = ["--init_from=tokenizer_start", "--data=evals.jsonl", "--max_steps=1"]
        trained(".", *start)
        ran = contents(".").keys()
        # of a task, whose samples lie in a folder with the person's own file
        trained(".", *start, *TASK[1:], "--data=reviews", "--max_prompt_length=8", "--overwrite=True")
        assert {"evals/0.jsonl", "evals/1.jsonl"} < contents(".").keys()
        (pairs,) = glob.glob("reviews-pairs-*.jsonl")
        os.remove(pairs)
        trained(".", *start, "--overwrite=True")
        assert contents(".").keys() == ran
    assert own.items() <= contents("study").items()


BLOCKED = ("config.json", "emoji.json", "vocab.json", "tdpo.py", "log.jsonl", "evals/0.jsonl", "state.pt",
           "chat_template.jinja")


def test_a_folder_with_files_that_a_run_would_replace_is_refused(runs):
    for n, name in enumerate(BLOCKED):
        folder = f"blocked{n}"
        os.makedirs(os.path.dirname(f"{folder}/{name}"))
        write_lines(f"{folder}/{name}", ["mine"])
        for overwrite in ("False", "True"):
            said = option_error(train.configure, on_pairs(folder, f"--overwrite={overwrite}"))
            assert f"has files that belong to no run in it: {name}; move them" in said
    # beside a run, too
    trained("guest", "--max_steps=1")
    write_lines("guest/adapter_config.json", ["mine"])
    before = contents("guest")
    replacing = on_pairs("guest", "--overwrite=True")
    says(2, "belong to no run in it: adapter_config.json; move them", "train.py", *replacing)
    assert contents("guest") == before
    # in a folder from which the run was removed, but not its hidden files
    for path in glob.glob("guest/*"):
        os.remove(path)
    write_lines("guest/config.json", ["mine"])
    says(2, "belong to no run in it: config.json; move them", "train.py", *replacing)


def test_tokenizers_that_save_a_folder_are_saved(runs):
    """Several named chat templates lie in a folder; they are saved over and over."""
    model, tokenizer = sample.load_model("sft")
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "tools " + TEMPLATE}
    for step in range(2):
        train.save("folder", model, tokenizer, torch.optim.RMSprop(model.parameters()), step)
        assert AutoTokenizer.from_pretrained("folder").chat_template == tokenizer.chat_template
    assert any(os.path.isdir(path) for path in glob.glob("folder/*"))


def test_an_interrupted_save_leaves_a_whole_checkpoint(runs, monkeypatch):
    """Interrupted before its 1st, 2nd, ... move, until it goes through."""
    trained("interrupted", "--max_steps=1")
    model, tokenizer = sample.load_model("interrupted")
    optimizer, replace, stop_at, moves = torch.optim.RMSprop(model.parameters()), os.replace, -1, [()]

    def stopping(*args):
        moves.append(args)
        if len(moves) > stop_at:
            raise KeyboardInterrupt
        replace(*args)
    monkeypatch.setattr(os, "replace", stopping)
    while len(moves) > stop_at:
        before, stop_at = state_of("interrupted")["step"], stop_at + 1
        moves.clear()
        with contextlib.suppress(KeyboardInterrupt):
            train.save("interrupted", model, tokenizer, optimizer, 100 + stop_at, fingerprint="x", started=0)
        assert state_of("interrupted")["step"] == (100 + stop_at if stop_at else before)
    assert stop_at > 3 and not os.path.exists("interrupted/.saving")


def small_files():
    """A full disk's stand-in: no file may grow beyond 100 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_save_that_fails_keeps_the_one_before(runs):
    trained("full", "--max_steps=2")
    says(1, "error: step 4 could not be saved in full: .*the last checkpoint there is whole", "train.py",
         "--resume=True", "--out_dir=full", "--max_steps=4", before=small_files)
    says(1, "step 2 could not be saved in full-0: .*start again with --overwrite=True", "train.py",
         *on_pairs("full-0", "--max_steps=2"), before=small_files)
    assert state_of("full")["step"] == 2 and not os.path.exists("full/.saving")
    sample.load_model("full")


def test_a_full_disk_ends_in_one_sentence(runs):
    """Between two saves, in sample.py, and when the tokens are written for other processes."""
    said = "error: .*make room, and start again; a run that has saved a checkpoint continues .* --resume=True\n$"
    out = says(1, said, "sample.py", "--model=tdpo2", "--num_prompts=1", "--out=/dev/full")
    assert "policy    | 1 responses | entropy" in out
    trained("limit", "--max_steps=20", "--eval_interval=0", "--log_interval=1000")
    says(1, said, "train.py", *resuming("limit", "--max_steps=50"), before=limit_the_log)
    assert state_of("limit")["step"] == 20 and last_step("limit") >= 29
    resumed("limit", "--max_steps=21")
    write_lines("long.jsonl", [pair_of("the plot was " * 12 + str(n), " wonderful", " annoying") for n in range(1000)])
    codes, outs = many(2, *on_pairs("full-2", "--data=long.jsonl"), before=small_files)
    assert codes[0] == 1 and re.search(said, outs[0]) and "Traceback" not in "".join(outs), outs


def limit_the_log():
    """before: after ten steps no file may grow any more."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(n):
        if n == 10:
            size = os.path.getsize("limit/log.jsonl")
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    stepping(limit)


class Evil:
    """Pickled, it makes a file called evil when it is loaded."""
    def __reduce__(self):
        return open, ("evil", "w")


def without_the_weights(data):
    state = torch.load(io.BytesIO(data), weights_only=True)
    del state["weights"]
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


DAMAGES = [     # (file, what it then holds, exit code, message)
    ("state.pt", lambda data: pickle.dumps(Evil()), 1, "the checkpoint in damaged. cannot be read"),
    ("state.pt", lambda data: b"", 1, "the checkpoint in damaged. cannot be read"),
    ("options.json", lambda data: b"{", 2, "cannot be continued"),
    ("options.json", lambda data: data.replace(b'"beta"', b'"gamma"'), 2, "by a different version"),
    ("state.pt", without_the_weights, 1, "the checkpoint in damaged. cannot be read"),
]


def test_damaged_checkpoints_are_refused_untouched(runs):
    trained("to-damage", "--max_steps=1")
    for n, (name, damage, code, message) in enumerate(DAMAGES):
        folder = shutil.copytree("to-damage", f"damaged{n}")
        path = pathlib.Path(folder, name)
        path.write_bytes(damage(path.read_bytes()))
        before = contents(folder)
        says(code, message, "train.py", *resuming(folder, "--max_steps=4"))
        assert before == contents(folder)
    assert not os.path.exists("evil")


def test_epochs_and_decay(runs):
    """48 pairs in steps of 8; a run whose rate decays keeps its number of steps."""
    trained("decay", "--epochs=1.75", "--lr_decay=linear", "--eval_interval=0")
    rates = [x["lr"] for x in steps_of("decay")]
    assert rates == approx([1e-4 * x for x in (1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0)])
    for name, value in (("epochs", 2), ("max_steps", 12)):
        said = option_error(train.configure, resuming("decay", f"--{name}={value}"))
        assert f"--{name} would change the run in decay: leave it out" in said
    says(1, "decay is at step 11 already", "train.py", *resuming("decay", "--epochs=1.75"))
    # a task's own number of steps
    assert train.configure(["--out_dir=x"])["max_steps"] == 120
    assert train.configure(["--out_dir=x", "--epochs=3"])["max_steps"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# several processes


@pytest.mark.parametrize("name, parts, options", [
    ("tied", ((3, 4),), ["--ref_from=sft"]),
    ("untied", ((1, 2), (2, 4)), ["--init_from=untied", "--ref_from=sft", "--optimizer=adamw"]),
    ("adapters", ((2, 2), (1, 4)), ["--method=sft", "--lora_rank=3"]),
    ("bf16", ((1, 2), (2, 4)), ["--init_from=bf16", "--dtype=bfloat16"]),
])
def test_any_number_of_processes_ends_where_one_does(runs, words, name, parts, options):
    """parts: (processes, steps) of a run that stops and goes on, and computes in smaller rows. The model called untied
    has a bias in its output layer; it and the one in bf16 have buffers of rotary frequencies."""
    sizes = dict(SIZES, vocab_size=len(words), eos_token_id=0)
    if name == "untied":
        save_with_words(tiny(hf.PhiConfig(**sizes, **MIDDLE)), name)
    # numbers of bf16 have a reference in bf16, if it is not spread; there biases come before weights
    if name == "bf16":
        save_with_words(tiny(hf.LlamaConfig(**sizes, **GROUPS, attention_bias=True)).bfloat16(), name)
    trained(name + "-whole", "--max_steps=4", "--batch_size=7", "--eval_interval=2", *options)
    # several rows a step, so that every process has some
    small = "--micro_tokens=128", "--checkpoint_activations=True"
    go = on_pairs(name + "-parts", "--batch_size=7", "--eval_interval=2", *options)
    for count, steps in parts:
        codes, (out, *_) = many(count, *go, *small, f"--max_steps={steps}", before=counting_checkpoints)
        assert codes == [0] * count and out.count("next: python sample.py") == 1, out
        go = resuming(name + "-parts")
    # two blocks, in each step and process a pass at least
    assert os.path.getsize("checkpoints") >= 2 * 4
    if name != "bf16":
        same_run(name + "-whole", name + "-parts", exactly=False)
    else:           # several processes gather norms in bf16, too
        for x, y in zip(steps_of("bf16-whole"), steps_of("bf16-parts"), strict=True):
            assert x["loss"] == approx(y["loss"], rel=3e-4) and x["grad_norm"] == approx(y["grad_norm"], rel=1e-3)
    sample.load_model(name + "-parts")


def counting_checkpoints():
    """before: a file counts the passes through checkpointed blocks."""
    inner = torch.utils.checkpoint.checkpoint

    def counted(*args, **options):
        with open("checkpoints", "a") as f:
            f.write(".")
        return inner(*args, **options)
    torch.utils.checkpoint.checkpoint = train.checkpoint = counted


def stepping(in_step):
    """before: call a function in every step, with the step's number."""
    clip, count = torch.nn.utils.clip_grad_norm_, []

    def counted(*args):
        count.append(1)
        in_step(len(count))
        return clip(*args)
    torch.nn.utils.clip_grad_norm_ = counted


def signal_to_rank_1():
    stepping(lambda n: n == 3 and os.environ["RANK"] == "1" and os.kill(os.getpid(), signal.SIGTERM))


def test_processes_stop_together_and_go_on(runs):
    """A signal that one of them gets ends all after the same step, which is saved; they go on to the task's end, where
    all sample. Blocks gather their weights in bf16, in which all of them have to sample, too."""
    sizes = dict(SIZES, vocab_size=163, eos_token_id=0)
    save_with_words(tiny(hf.LlamaConfig(**sizes, **GROUPS)).bfloat16(), "stopping")
    go = [*TASK, "--init_from=stopping", "--dtype=bfloat16", "--max_new_tokens=8", "--max_prompt_length=8",
          "--out_dir=stopped", "--max_steps=100", "--batch_size=8", "--eval_interval=0"]
    codes, (out, *_) = many(2, *go, before=signal_to_rank_1)
    assert codes == [128 + signal.SIGTERM] * 2 and "stopped after step 3" in out, out
    assert state_of("stopped")["step"] == 3
    codes, (out, *_) = many(2, *resuming("stopped", "--max_steps=5"))
    first, last = [x for x in log_of("stopped") if "eval_reward" in x]
    assert codes == [0, 0], out
    assert last["step"] == 5 and last["eval_n"] == 24 and first["eval_sample_kl"] == 0 < last["eval_sample_kl"]


def test_an_error_of_one_process_ends_all(runs):
    codes, (out, *_) = many(2, *on_pairs("many-bad", "--max_length=500"))
    assert all(codes) and out.count("more than the 128 positions") == 1 and "Traceback" not in out, out


def test_torchrun_ends_with_0(runs):
    """TDPO_RUNS=100 for a hundred: a process once aborted at its exit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE + "/train.py"]
    command += on_pairs("torchrun", "--max_steps=1", "--eval_interval=0", "--overwrite=True")
    for n in range(int(os.environ.get("TDPO_RUNS", 1))):
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
        assert done.returncode == 0 and done.stdout.count("next: python sample.py") == 1, done.stdout + done.stderr


def test_a_signal_finishes_the_step_and_saves(runs):
    run = Run("train.py", *on_pairs("signal", "--max_steps=100000"))
    run.wait_for(lambda: last_step("signal") >= 3)
    says(1, "a run is at work in it", "train.py", *on_pairs("signal", "--overwrite=True"))
    os.kill(run.process.pid, signal.SIGINT)
    (code, out), step = run.end(), state_of("signal")["step"]
    assert "stopped after step" in out and "continue: python train.py --resume=True --out_dir=signal\n" in out
    assert code == 128 + signal.SIGINT and log_of("signal")[-1]["step"] == step >= 3
    resumed("signal", f"--max_steps={step + 2}")
    trained("signal-whole", f"--max_steps={step + 2}")
    same_run("signal-whole", "signal")


# ---------------------------------------------------------------------------------------------------------------------
# signals and kills


def two_hangups():
    stepping(lambda n: [os.kill(os.getpid(), signal.SIGHUP) for _ in range(2)])


def nohup():
    """SIGHUP is ignored; it comes in step 1, SIGTERM in step 3."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stepping(lambda n: n in (1, 3) and os.kill(os.getpid(), signal.SIGHUP if n == 1 else signal.SIGTERM))


def close_the_terminal():
    """before: a terminal of its own, which is closed in step 3; nothing can be printed afterwards."""
    os.setsid()
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSCTTY)
    for fd in (0, 1, 2):
        os.dup2(inside, fd)
    stepping(lambda n: n == 3 and os.close(terminal))


def test_a_hangup_that_comes_twice_saves_and_one_that_is_ignored_does_nothing(runs):
    says(128 + signal.SIGHUP, "stopped after step 1 ", "train.py", *on_pairs("hangup"), before=two_hangups)
    says(128 + signal.SIGTERM, "stopped after step 3 ", "train.py", *on_pairs("nohup"), before=nohup)
    assert state_of("hangup")["step"] == 1 and state_of("nohup")["step"] == 3


def test_a_terminal_that_is_closed_saves(runs):
    code, _ = Run("train.py", *on_pairs("closed"), before=close_the_terminal).end()
    assert code and last_step("closed") == state_of("closed")["step"] == 3


def one_signal():
    stepping(lambda n: os.kill(os.getpid(), signal.SIGTERM))


def two_signals():
    stepping(lambda n: [(os.kill(os.getpid(), signal.SIGTERM), time.sleep(3.1)) for _ in range(2)])


def one_signal_twice():
    """As torchrun hands it on to processes that have got it already."""
    stepping(lambda n: [(os.kill(os.getpid(), signal.SIGTERM), time.sleep(0.01)) for _ in range(2)])


def test_a_signal_saves_nothing_broken_and_a_second_one_leaves_at_once(runs):
    broken = "--learning_rate=1e18", "--warmup_steps=0"
    says(1, "held-out loss after step 1 is nan", "train.py", *on_pairs("signals1", *broken), before=one_signal)
    says(-signal.SIGTERM, "", "train.py", *on_pairs("signals2"), before=two_signals)
    assert not glob.glob("signals[12]/state.pt")
    says(128 + signal.SIGTERM, "stopped after step 1", "train.py", *on_pairs("signals3"), before=one_signal_twice)
    assert state_of("signals3")["step"] == 1


def test_a_signal_ends_every_process(runs):
    """While the embedded task trains its SFT model, in a process of its own."""
    run = Run("train.py", "--out_dir=nobody/run")
    run.wait_for(lambda: os.path.exists("nobody/reviews-sft-1-new/.lock"))
    run.process.terminate()
    assert run.end()[0] == 128 + signal.SIGTERM
    with open("nobody/reviews-sft-1-new/.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_memory_is_flat(runs):
    """The peak of a run's memory is reached early. TDPO_STEPS=500 for a closer look."""
    steps = int(os.environ.get("TDPO_STEPS", 40))
    trained("flat", f"--max_steps={steps}", "--eval_interval=0")
    peaks = [x["peak_gib"] for x in steps_of("flat")]
    assert peaks[-1] < 1.02 * peaks[steps // 2]


def test_kills_leave_the_last_save(runs):
    """SIGKILL at random moments of a run that saves at every step; every other kill falls into a save."""
    rng, step = np.random.default_rng(), 0
    options = on_pairs("kills", "--max_steps=100000", "--log_interval=1000", "--save_interval=1", "--eval_pairs=2")

    def saved():
        return os.path.exists("kills/state.pt") and os.stat("kills/state.pt").st_ino
    for n in range(int(os.environ.get("TDPO_KILLS", 3))):
        before, run = saved(), Run("train.py", *options)
        run.wait_for(lambda: saved() != before)
        time.sleep(rng.uniform(0, 0.3))
        if n % 2 == 0:
            run.wait_for(lambda: os.path.exists("kills/.saving"))
            time.sleep(rng.uniform(0, 0.02))
        logged = last_step("kills")
        run.process.kill()
        run.end()
        state = state_of("kills")
        assert last_step("kills") >= state["step"] >= max(step, logged - 1)
        sample.load_model("kills")
        step, options = state["step"], resuming("kills")


# ---------------------------------------------------------------------------------------------------------------------
# input errors: a sentence or two, a non-zero exit, nothing written


OPTIONS = {     # options: what the message says
    "--methd=dpo": "unknown option --methd; did you mean --method",
    "--method=TDPO2": "--method: invalid choice: 'TDPO2'",
    "--method=dpo --alpha=0.5": "--alpha would be ignored with --method=dpo",
    "--beta=nan": "--beta=nan must be a finite number",
    "--epochs=0": "--epochs=0.0 must be greater than 0",
    "--epochs=1 --max_steps=5": "--epochs and --max_steps contradict each other",
    "--batch_size=0": "--batch_size=0 must be at least 1",
    "--alpha=-0.5": "--alpha=-0.5 must not be negative",
    "--resume=maybe": "argument --resume: ",
    "--resume=True --out_dir=nowhere": "the run in nowhere cannot be continued: [Errno 2] No such file",
    "--resume=True --overwrite=True --out_dir=tdpo2": "contradict each other",
    "--resume=True --out_dir=tdpo2 --alpha=1": "--alpha would change the run in",
    "--out_dir=tdpo2": "holds a run already",
    "--data=pairs.jsonl --init_from=scratch": "scratch is the untrained model that --data=reviews starts from",
    "--init_from=tdpo2 --out_dir=tdpo2 --overwrite=True": "is a model that the run starts from",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_option_errors(runs, options):
    assert OPTIONS[options] in option_error(train.configure, options.split())


def edited_programs(folder, *edits):
    """Copies of the programs in a folder, each edit (file, text, its replacement) made at exactly one place."""
    (folder / "assets").mkdir(exist_ok=True)
    shutil.copy(os.path.join(HERE, "assets", "grammar.json"), folder / "assets")
    for name in ("tdpo.py", "sample.py", "eval_imdb.py", "train.py"):
        text = text_of(name)
        for file, old, new in edits:
            if file == name:
                assert text.count(old) == 1, old
                text = text.replace(old, new)
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder / "train.py")


def importing_the_copies():
    """before: the programs import each other from the folder of train.py's copy."""
    for name in ("tdpo", "sample", "eval_imdb", "train"):
        sys.modules.pop(name, None)
    sys.path.insert(0, os.path.dirname(sys.argv[0]))


def test_every_assignment_among_the_knobs_is_an_option(runs, tmp_path):
    program = edited_programs(tmp_path, ("train.py", "# model\ninit_from", "gamma = 0.5 # é, 5 % of it\n"
                                         + "# " + 100 * "-" + "\ndelta: int = 3\n# model\ninit_from"))
    out = says(0, "usage: python train.py", program, "--help")
    assert re.search(r"  --gamma +é, 5 % of it \[0.5\]\n", out) and re.search(r"  --delta +\[3\]\n", out), out
    assert all(re.search(rf"^  --{name}\s+\S", out, re.M) for name in train.configure(["--out_dir=x"]))
    says(2, "argument --delta: invalid int value: '0.5'", program, "--gamma=0.25", "--delta=0.5")
    says(2, "argument --resume: invalid choice: 'yes'", program, "--resume=yes")
    # an edited default is checked as an option is
    program = edited_programs(tmp_path, ("train.py", 'optimizer = "rmsprop"', 'optimizer = "RMSprop"'))
    says(2, "--optimizer=RMSprop is not one of rmsprop, adamw", program, *on_pairs("edited", "--max_steps=1"))


def test_a_knob_of_the_objective_takes_three_places(runs, tmp_path):
    """Its global, the function of the objective, and the line that hands it over."""
    program = edited_programs(
        tmp_path, ("train.py", "\n# data\ndata =", "\ngamma = 0.5  # margin that is aimed at\n# data\ndata ="),
        ("tdpo.py", "    loss = -F.logsigmoid(m)", "    loss = -F.logsigmoid(m - gamma)"),
        ("tdpo.py", "loss(method, w, l, beta=0.1, **", "loss(method, w, l, beta=0.1, gamma=0, **"),
        ("train.py", "beta=beta, alpha=alpha)", "beta=beta, alpha=alpha, gamma=gamma)"))
    options = on_pairs("gamma", "--gamma=2", "--max_steps=2", "--beta=0.3", "--alpha=0.7")
    says(0, "saved gamma", program, *options, before=importing_the_copies)
    assert log_of("gamma")[0]["eval_loss"] == approx(math.log(1 + math.exp(2)), abs=1e-6)
    assert json.load(open("gamma/options.json"))["gamma"] == 2 and "gamma" in open("gamma/tdpo.py").read()
    # and the others were handed over, too
    last = steps_of("gamma")[-1]
    v = last["logratio_w"] - last["logratio_l"] - 0.7 * (last["kl_l"] - last["kl_w"])
    assert last["margin"] == approx(0.3 * v, rel=1e-3, abs=1e-6) and abs(v) > 1e-4


@pytest.mark.parametrize("data, name", [
    ("reviews", "reviews"), ("some/pairs.jsonl.gz", "pairs"), ("pairs.v2.csv", "pairs.v2"),
    ("shards/train-[0-9]*.parquet", "shards"), ("dir/", "dir"), ("owner/name", "name"), ("/", "data"),
    ("*.jsonl", "mine"),
])
def test_a_run_without_a_directory_gets_one_with_the_name_of_its_data(data, name, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert train.configure([f"--data={data}", "--init_from=x"])["out_dir"] == f"out/{name}-tdpo2"


def test_a_wrong_reward_or_texts_is_found_before_anything_trains(runs):
    for name, data in (("reward", "reviews"), ("texts", "imdb")):
        out = says(1, "error: .*nobody/nothing", "train.py", f"--data={data}", f"--{name}=nobody/nothing",
                   f"--out_dir=no-{name}/run")
        assert "SFT" not in out and os.listdir(f"no-{name}/run") == [".lock"] and os.listdir(f"no-{name}") == ["run"]


MODELS = {      # a directory that is no model to train: what the message says
    "nobody/nothing": "cannot load nobody/nothing.*--data=reviews",
    "no-tokenizer": "no-tokenizer has no tokenizer|cannot load no-tokenizer",
    "remote-code": "cannot load remote-code",
    "translator": r"cannot load translator: .*T5Config'> for this kind of AutoModel: \S+$",
    "adapter": "adapter is an adapter, not a whole model: load it on some/base with",
    "nan-weights": "nan-weights: its weights are not finite: transformer.wte.weight",
    "fewer-tensors": "its weights lack 1 tensors of GPT2LMHeadModel: transformer.ln_f.bias",
    "other-words": "different vocabularies",
}


@pytest.fixture(scope="session")
def broken_models(made_once):
    """Directories of models that cannot be trained, made of sft."""
    with contextlib.chdir(made_once):
        for name in ("no-tokenizer", "remote-code", "other-words", "adapter"):
            shutil.copytree("sft", name)
        for path in glob.glob("no-tokenizer/tokenizer*"):
            os.remove(path)
        write_lines("adapter/adapter_config.json", ['{"base_model_name_or_path": "some/base"}'])
        words = open("other-words/tokenizer.json").read()
        write_lines("other-words/tokenizer.json", [words.replace('"acting"', '"singing"')])
        code = dict(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
        write_lines("remote-code/config.json", [{**json.load(open("sft/config.json")), **code}])
        write_lines("remote-code/evil.py", ["open('ran', 'w')"])
        model = sample.load_model("sft")[0]
        model.transformer.wte.weight.data[3] = math.nan
        save_with_words(model, "nan-weights")
        weights = model.state_dict()
        del weights["transformer.ln_f.bias"]
        save_with_words(model, "fewer-tensors", state_dict=weights)
        config = hf.T5Config(vocab_size=163, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        save_with_words(hf.T5ForConditionalGeneration(config), "translator")


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_trained_are_refused(runs, broken_models, words, name):
    with pytest.raises(SystemExit, match="^error: .*" + MODELS[name]):
        sample.load_reference(name, words)
    assert not os.path.exists("ran")


def test_an_error_is_one_sentence_and_writes_nothing(runs):
    path = write_lines("one-prompt.jsonl", [GOOD, GOOD])
    out = says(1, "", "train.py", *on_pairs("one-prompt", f"--data={path}"))
    assert out.splitlines()[-1].startswith("error: all pairs share one prompt")
    assert os.listdir("one-prompt") == [".lock"]


TEXTS = ("\ud800", "\0\x1b[2J", "", " ", None, 1, [], {}, [None], [{}], [dict(role=1, content=[1])])
ODD = [b"\xff", b"[" * 100_000, b"[]", b"null", b"NaN", b'{"": {}}', b'{"prompt": "a", "prompt": 1}',
       *(json.dumps(dict(prompt=a, chosen=b, rejected=c)).encode() for a in TEXTS for b in TEXTS for c in TEXTS)]


def test_odd_rows_never_end_in_a_traceback(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"\n".join([*ODD, GOOD.encode()]))
    with pytest.raises(SystemExit, match="no chat template"):
        read([dict(prompt=turns("q"), chosen=answer("y"), rejected=answer("n"))], spelled(), bad_rows=1)
    examples, counts = read(str(path), spelled(**TOOL), bad_rows=1)
    assert examples[-1].where.endswith(f"line {len(ODD) + 1}") and counts["read"] == len(ODD) + 1


def test_a_record_names_no_file_outside_its_folder(tmp_path):
    (tmp_path / "options.json").write_text("{}")
    (tmp_path / ".written").write_text("log.jsonl\n../precious.txt\n/etc/passwd\nevals/../../x\nevals/1.jsonl\n")
    assert train.written(str(tmp_path)) == ["log.jsonl", "evals/1.jsonl"]


def test_paths_below_a_folder_with_brackets_are_found(tmp_path, monkeypatch):
    (tmp_path / "[a] b").mkdir()
    monkeypatch.chdir(tmp_path / "[a] b")
    write_lines("p1.jsonl", [dict(prompt="q", chosen="y", rejected="n")])
    found = train.configure(["--data=p*.jsonl", "--init_from=x", "--out_dir=y"])["data"]
    monkeypatch.chdir(tmp_path)
    assert [row["chosen"] for _, row in train.read_rows(found)] == ["y"]


def test_prompts_that_were_cut_are_not_sampled_whole(runs):
    """They would be other prompts than those of the run. One that is too long stops nothing."""
    rows = [pair_of("the plot was " * (n % 2 * 9 + 1) + str(n), " wonderful", " annoying") for n in range(80)]
    rows[1]["prompt"] += " the" * 200
    write_lines("cut.jsonl", rows)
    out = trained("cut", "--data=cut.jsonl", "--max_length=20", "--max_prompt_length=16", "--max_steps=1")
    kept, left = held_prompts_of("cut"), int(re.search(r"note: (\d+) held-out prompts were cut", out)[1])
    held = [row["prompt"] for row in rows if places([row["prompt"]])[0] < 0.1]
    assert kept == {x for x in held if len(x.split()) < 16} and left == len(held) - len(kept) > 0
    write_lines("long.jsonl", [row for row in rows if len(row["prompt"].split()) > 16])
    out = trained("all-cut", "--data=long.jsonl", "--max_length=20", "--max_prompt_length=16", "--max_steps=1")
    assert "held-out prompts were cut" in out and "next:" not in out


def test_a_loss_that_is_not_finite_stops_and_saves_nothing(runs):
    said = r"error: the loss \(nan\) .* of step 2 is not finite.*pairs: /.*/pairs.jsonl line \d+"
    says(1, said, "train.py", *on_pairs("nan", "--learning_rate=1e18", "--warmup_steps=0", "--max_steps=5"))
    assert not os.path.exists("nan/state.pt")


def chat_model(name, template=CHAT, **config):
    """A directory with a tiny chat model and a file of eight chat rows, which it returns."""
    tokenizer = spelled(**dict(CHATS, template=template))
    config = {**GPT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **config}
    tiny(hf.GPT2Config(**config)).save_pretrained(name)
    tokenizer.save_pretrained(name)
    return write_lines(name + ".jsonl", [chat_of(f"q{n}", "yes", "no") for n in range(8)])


def yesterday():
    """The scripts' clock, a day back."""
    now = time.time
    time.time = lambda: now() - 86400

    class Yesterday(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(time.time(), tz)
    datetime.datetime = Yesterday


def test_a_template_with_the_date_does_not_stop_a_resumed_run(runs):
    data = chat_model("dated", DATED)
    trained("dated-run", f"--data={data}", "--init_from=dated", "--max_steps=1", before=yesterday)
    resumed("dated-run", "--max_steps=2")


def test_a_reference_with_padding_is_compared_over_common_rows(runs):
    """Against plain forward passes; the policy has 110 rows of embeddings, the reference 120."""
    data = chat_model("rows110", vocab_size=110)
    chat_model("rows120", vocab_size=120)
    trained("padded", f"--data={data}", f"--eval_data={data}", "--init_from=rows110", "--ref_from=rows120",
            "--max_steps=1")
    (model, tokenizer), (ref, _), kls = sample.load_model("rows110"), sample.load_model("rows120"), []
    for n in range(8):
        prompt = ASKED.replace("q", f"q{n}")
        ids = tokenizer(prompt + "no<end>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        p, q = (m(ids).logits[0, -4:-1, :110].double().log_softmax(-1) for m in (model, ref))
        kls.append((q.exp() * (q - p)).sum().item())
    assert log_of("padded")[0]["eval_kl_l"] == approx(np.mean(kls), rel=1e-4) and np.mean(kls) > 1e-3
    assert sample.measure(model, ref, [[5, 6]], [[7, 8]])[0]["kl"].shape == (2,)


def test_a_reference_with_fewer_positions_is_not_overrun(runs):
    config = hf.GPT2Config(**dict(GPT, vocab_size=163, n_positions=48))
    save_with_words(tiny(config), "short-ref")
    says(1, "--max_length=64 is more than the 48 positions of .*short-ref", "train.py", *on_pairs(
        "short", "--ref_from=short-ref"))
    says(0, "over 1 prompts", "sample.py", "--model=sft", "--ref=short-ref", "--prompt=the plot was", "--num_samples=9",
         "--max_new_tokens=100", "--out=short.jsonl")
    assert max(row["tokens"] for row in lines_of("short.jsonl")) == 45
    trained("short", *TASK[1:], "--data=reviews", "--ref_from=short-ref", "--max_length=40", "--max_prompt_length=8",
            "--max_new_tokens=100", "--max_steps=1")
    says(0, "sft .scored. ", "eval_imdb.py", "--runs=short", "--score=sft", "--out=short.png")


def test_splits_of_a_data_set_are_trained_on_and_held_out(runs, sources):
    """The held-out split has no configuration of its own."""
    folder, _ = sources
    chat_model("letters")
    options = ["--init_from=letters", "--max_steps=1"]
    out = trained("split-run", f"--data={folder}/dict", "--data_split=other", "--eval_split=train", *options)
    assert "held out: 5 read = 5 evaluated + 0 beyond --eval_pairs + 0 left out" in out
    assert "data: 5 pairs read = 5 to train on + 0 held out + 0 left out" in out
    assert "warning: 5 of 5 held-out prompts are also trained on\n" in out
    data = f"--data={folder}/configs", "--data_config=two", f"--eval_data={folder}/a.jsonl"
    assert "held out: 5 read" in trained("configured", *data, *options)


def test_what_a_run_does_not_do_is_said(runs):
    config = hf.MixtralConfig(**dict(SIZES, vocab_size=163), **GROUPS, num_local_experts=2)
    save_with_words(tiny(config), "experts")
    out = trained("said", "--init_from=experts", "--batch_size=60", "--max_steps=2", "--warmup_steps=20")
    assert "--warmup_steps=20 is more than the 2 steps: the learning rate gets no higher than 1e-05 of 0.0001" in out
    assert "the loss that balances this model's experts (router_aux_loss_coef) is not part" in out
    assert "held-out prompts are also" not in out
    held = sum(place < 0.1 for place in places([row["prompt"] for row in lines_of("pairs.jsonl")]))
    assert f"data: 60 pairs read = {60 - held} to train on + {held} held out + 0 left out\n" in out


def test_a_rank_without_other_processes_is_the_first(monkeypatch):
    """Some schedulers set RANK for all that they start."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert train.join_processes() == (0, 1)


def test_show_data_prints_what_the_model_sees(runs):
    """Once, with any number of processes, and also of a file that has one prompt."""
    data = chat_model("shown")
    path = write_lines("one-shown.jsonl", [GOOD])
    assert "\n  prompt   |" in says(0, "", "train.py", *on_pairs("one-shown", f"--data={path}", "--show_data=1"))
    codes, outs = many(2, *on_pairs("shown-run", f"--data={data}", "--init_from=shown", "--show_data=2"))
    out = "".join(outs)
    assert codes == [0, 0] and "Traceback" not in out, out
    assert out.count("\n  rejected |[n][o][<end>]\n") == 2 and "  chosen   |[y][e][s][<end>]\n" in out
    assert re.search(r"  prompt   \|<s><im>user\\nq\d<end>\\n<im>assistant\\n\n", out)
    assert re.search(r"chosen +4 +4 +4 +4\n", out) and os.listdir("shown-run") == [".lock"]


def test_sample_needs_no_eos_and_says_what_it_does_with_a_prompt(runs):
    chat_model("no-eos", eos_token_id=None)
    spelled(eos=None, bos="<s>", template=CHAT).save_pretrained("no-eos")
    run = ["sample.py", "--model=no-eos", "--max_new_tokens=4", "--out=no-eos.jsonl", "--prompt=q"]
    says(0, "note: prompts that are text are used as they are; --chat", *run)
    assert lines_of("no-eos.jsonl")[0]["tokens"] == 4
    assert "note" not in says(0, "over 1 prompts", *run, "--chat")
    assert lines_of("no-eos.jsonl")[0]["prompt"] == ASKED


def test_output_is_created_when_it_is_written_and_not_before(runs):
    write_lines("broken.jsonl", ["{"])
    write_lines("mine.jsonl", ["mine"])
    for out in ("new/folder/x.jsonl", "mine.jsonl"):
        says(1, "cannot read broken.jsonl, line 1", "sample.py", "--model=tdpo2", "--prompts=broken.jsonl",
             f"--out={out}")
    assert not os.path.exists("new/folder/x.jsonl") and open("mine.jsonl").read() == "mine\n"
    for out in (".", "new/", "mine.jsonl/x", "/proc/x/y"):
        assert "choose a different --out" in option_error(sample.writable, argparse.ArgumentParser(), out)
    says(0, "wrote new/folder/x.jsonl", "sample.py", "--model=tdpo2", "--num_prompts=1", "--out=new/folder/x.jsonl")
    assert len(lines_of("new/folder/x.jsonl")) == 2
    # not even root makes directories there
    says(1, "error: .*/proc/x", "train.py", "--out_dir=/proc/x")


def without_locks():
    """before: no file can be locked, as on some network file systems."""
    fcntl.flock = mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))


def test_file_systems_without_locks_are_said_and_trained_on(runs):
    said = r"note: the file system has no locks \(\[Errno \d+\] No locks[\s\S]*\nsaved lockless"
    says(0, said, "train.py", *on_pairs("lockless", "--max_steps=1"), before=without_locks)


WANDB = """
import os, types
def record(line):
    with open("wandb.txt", "a") as f:
        f.write(line + "\\n")
def init(id=None, resume=None, config=None, dir=None, **others):
    assert resume == "allow" and config["wandb_log"]
    record(f"init {id} {os.path.exists(os.path.join(dir, 'options.json'))}")
    if os.environ["FAILS"] == "init":
        raise RuntimeError("No API key\\nconfigured")
    return types.SimpleNamespace(id=id or "a1")
def log(columns, step=None):
    record(f"log {step} {len(columns) > 3}")
    if os.environ["FAILS"] == "log":
        raise RuntimeError("no connection")
finish = lambda: log({})
"""


def importing_wandb():
    sys.path.insert(0, "wandb-stub")


def test_a_resumed_run_goes_on_at_wandb_and_failures_cost_no_training(runs):
    """With a package of that name that writes down its calls."""
    os.makedirs("wandb-stub")
    write_lines("wandb-stub/wandb.py", [WANDB])

    def calls():
        lines = open("wandb.txt").read().splitlines()
        os.remove("wandb.txt")
        return lines
    works, fails_at_log = (dict(before=importing_wandb, environ=dict(FAILS=x)) for x in ("", "log"))
    trained("wandb-run", "--wandb_log=True", "--max_steps=1", **works)
    assert calls() == ["init None False", "log 0 True", "log 1 True", "log 1 True"]
    # a run that goes on without it keeps its id all the same
    resumed("wandb-run", "--wandb_log=False", "--max_steps=2", **works)
    resumed("wandb-run", "--wandb_log=True", "--max_steps=3", **works)
    assert calls() == ["init a1 True", "log 3 True", "log 3 True"]
    says(1, "error: --wandb_log=True: No API key configured\n$", "train.py", *on_pairs("wandb-b", "--wandb_log=True"),
         before=importing_wandb, environ=dict(FAILS="init"))
    assert os.listdir("wandb-b") == [".lock"]
    codes, outs = many(2, *on_pairs("wandb-two", "--wandb_log=True", "--max_steps=1"), **fails_at_log)
    assert codes == [0, 0] and "warning: wandb.log failed: no connection\n" in outs[0], outs


# ---------------------------------------------------------------------------------------------------------------------
# README: its examples run as they stand, and its options exist


def block(containing):
    (found,) = [x for x in re.findall(r"```python\n(.*?)```", text_of("README.md"), re.S) if containing in x]
    return found


def test_the_plain_loop_of_the_readme(runs):
    """Also with the fused form in its place."""
    examples, _ = read("pairs.jsonl", sample.load_model("sft")[1], max_length=64)
    pairs = [example[2:5] for example in examples]
    # here the policy does not start at its reference
    loop = block("for pairs in batches").replace("ref = copy.deepcopy(model).requires_grad_(False)", "")
    weights = []
    exec(block("def fused_loss"), fused := dict(torch=torch))
    line = re.search(r"losses, stats = .*", loop)[0]
    for form in (line, "losses, stats = fused_loss(model, ref, ids, labels)"):
        (ref, _), (model, _), seen = sample.load_model("sft"), sample.load_model("tdpo2"), []
        before, expected = [p.clone() for p in model.parameters()], own_loss(model, ref, examples[:8])[0].item()
        scope = dict(fused, model=model, ref=ref, batches=[pairs[:8], pairs[8:12]], print=lambda *x: seen.append(x))
        exec(loop.replace(line, form), scope)
        assert scope["stats"]["loss"].shape == (4,) and len(seen) == 2 and seen[0][-1] == approx(expected, rel=1e-5)
        weights.append(list(model.parameters()))
        assert not all(map(torch.equal, before, weights[-1]))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*weights))


def trl_trainer(models={}, **options):
    """README's subclass on the file of pairs. models: its arguments instead of two models; options: of DPOConfig."""
    import datasets
    import trl
    exec(block("class TDPOTrainer"), scope := {})
    ref, tokenizer = sample.load_model("sft")
    given = dict(per_device_train_batch_size=8, use_cpu=True, bf16=False, report_to=[], max_length=64, max_steps=1,
                 max_grad_norm=0, save_strategy="no", disable_tqdm=True)
    args = trl.DPOConfig(tempfile.mkdtemp(), **{**given, **options})
    rows = datasets.Dataset.from_list(lines_of("pairs.jsonl"))
    models = models or dict(model="tdpo2", ref_model=ref)
    return scope["TDPOTrainer"](args=args, train_dataset=rows, processing_class=tokenizer, **models)


def trl_gradients(models={}, **options):
    """{name: gradient} of one step."""
    trainer, found = trl_trainer(models, **options), {}

    class Look(hf.TrainerCallback):
        def on_pre_optimizer_step(self, *args, model, **kwargs):
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    trainer.add_callback(Look())
    trainer.train()
    assert found and all(x.any() for x in found.values())
    return {name.removeprefix("module."): x for name, x in found.items()}


def trl_examples(trainer):
    """The first batch of the trainer, and the pairs in it."""
    batch, responses = next(iter(trainer.get_train_dataloader())), []
    for ids, completion, real in zip(*(batch[x] for x in ("input_ids", "completion_mask", "attention_mask"))):
        responses.append([ids[(real == 1) & (completion == part)].tolist() for part in (0, 1)])
    return batch, [example_of(*responses[n], responses[n + 8][1]) for n in range(8)]


def test_the_trl_subclass_of_the_readme(runs):
    pytest.importorskip("trl")
    trainer = trl_trainer()
    batch, examples = trl_examples(trainer)
    model, ref = sample.load_model("tdpo2")[0], sample.load_model("sft")[0]
    expected, _ = own_loss(model, ref, examples)
    loss, stats = trainer._compute_loss(trainer.model, batch, True)
    assert loss.item() == approx(expected.item(), rel=1e-5)
    logged = trainer._metrics["train" if trainer.model.training else "eval"]
    for name in ("kl_w", "kl_l"):
        assert logged[name] == [approx(stats[name].mean().item())]
    expected.backward()
    # half of the pairs at a time is the same step
    whole, halves = trl_gradients(), trl_gradients(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for name, p in model.named_parameters():
        assert torch.allclose(whole[name], p.grad, atol=1e-6) and torch.allclose(halves[name], p.grad, atol=1e-6), name

    # what it cannot do is said
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled", "precompute_ref_logps"):
        with mock.patch.object(trainer, name, True), pytest.raises(ValueError, match="leave out FSDP, DeepSpeed and"):
            trainer._compute_loss(trainer.model, batch, False)
    scaled = tiny(hf.GraniteConfig(**dict(SIZES, vocab_size=163), **MIDDLE, logits_scaling=1.01))
    with mock.patch.object(trainer, "ref_model", scaled), pytest.raises(ValueError, match="model's logits are not"):
        trainer._compute_loss(trainer.model, batch, False)


def test_the_trl_subclass_trains_adapters(runs):
    """A new adapter's reference is the model without it; that of an adapter that was trained before is its copy."""
    pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
    fresh = dict(model="tdpo2", peft_config=config)
    trainer = trl_trainer(fresh)
    batch, examples = trl_examples(trainer)
    loss = trainer._compute_loss(trainer.model, batch, False).item()
    merged = copy.deepcopy(trainer.model).merge_and_unload()
    assert loss == approx(own_loss(merged, sample.load_model("tdpo2")[0], examples)[0].item(), rel=1e-5)
    assert abs(loss - math.log(2)) > 1e-3 and all("lora" in name for name in trl_gradients(fresh))
    trainer = trl_trainer(dict(model=peft.get_peft_model(AutoModelForCausalLM.from_pretrained("tdpo2"), config)))
    assert trainer._compute_loss(trainer.model, batch, False).item() == approx(math.log(2), rel=1e-6)


def trl_process():
    """One process of two: half of the step's pairs."""
    gradients = trl_gradients(per_device_train_batch_size=4)
    if os.environ["RANK"] == "0":
        torch.save(gradients, "trl.gradients")


def test_the_trl_subclass_in_two_processes(runs):
    """DDP gives the gradients of one process."""
    pytest.importorskip("trl")
    write_lines("trl_process.py", ["import test_tdpo", "test_tdpo.trl_process()"])
    codes, outs = many(2, name=os.path.abspath("trl_process.py"), environ=dict(ACCELERATE_USE_CPU="true"))
    assert codes == [0, 0], outs
    found, expected = torch.load("trl.gradients"), trl_gradients()
    assert list(found) == list(expected)
    assert all(torch.allclose(found[name], x, atol=1e-6) for name, x in expected.items())


def test_readme_names_options_that_exist():
    readme = text_of("README.md")
    scripts = "sample.py", "eval_imdb.py", "test_tdpo.py", *glob.glob(os.path.join(HERE, "extras", "*.py"))
    source = "".join(text_of(name) for name in scripts)
    known = {*train.configure(["--out_dir=x"]), *re.findall(r'add_argument\("--(\w+)"', source), "help"}
    known |= set("nproc_per_node nnodes rdzv_backend rdzv_endpoint model_outputs reference_outputs".split())
    named = set(re.findall(r"--(\w+)", readme))
    assert named <= known and len(named) > 15, named - known
    assert len(text_of("tdpo.py").splitlines()) < 200
