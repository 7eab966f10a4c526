"""Benchmarks.

    python -m extras.bench gpu FOLDER       # on a GPU: tests, the loss layer, steps of train.py and of TRL
    python -m extras.bench loss FOLDER      # the loss layer: 4096 tokens, vocabulary 50257, width 768
    python -m extras.bench toy FOLDER       # all of it at toy sizes

The first takes at most twelve minutes. After each item it writes FOLDER/gpu-CARD.json and FOLDER/gpu-CARD.md. If you
start it again, it continues with the items that are missing, and then tries again those that failed.
"""
import argparse
import contextlib
import functools
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import train        # before torch, because it sets up the memory of the process
import numpy as np
import torch
import transformers as hf
from torch.optim.optimizer import register_optimizer_step_post_hook

import sample
import tdpo
from eval_imdb import read_log, scratch_model
from extras.compare import PROJECT
from extras.memory import build, llama

DEVICE = sample.DEVICES[0]


def run_command(command, limit):
    """Run a command: (exit code, output). All processes that it has started end with it. RuntimeError: it takes longer
    than limit seconds."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=output, process_group=0)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it did not end within {limit:.0f} seconds") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return process.returncode, output.read()


def apart(limit, measure, *args):
    """The result of a function of this file, run in a process of its own, so that no measurement finds the memory or
    the compiled code of a different one. RuntimeError: the last words of a process that failed."""
    code, output = run_command([sys.executable, "-m", "extras.bench", "one", measure.__name__, json.dumps(args)], limit)
    results = re.findall(r"^result: (.*)", output, re.M)
    if code != 0 or not results:
        raise RuntimeError(f"exit code {code}: {output[-2000:]}")
    return json.loads(results[-1])


# -----------------------------------------------------------------------------
# the loss layer, forward and backward under bf16 autocast


def naive(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen):
    """Logits of all N response tokens at once, N x V."""
    tokens = tdpo.token_stats(hidden @ weight.T, ref_hidden @ ref_weight.T, labels)
    sequence, rejected = (2 * pair + chosen).to(hidden.device), torch.arange(0, 2 * int(pair[-1]) + 2, 2)
    losses, _ = tdpo._pair_losses(tokens, labels, sequence, 2 * len(rejected), rejected + 1, rejected, "tdpo2", {})
    return losses.mean()


def fused(*case):
    loss, _ = tdpo.fused_tdpo_loss(*case)
    return loss


def products(hidden, weight, ref_hidden, *_):
    """The floor: the fused form's four products in its chunks and dtypes, and the rounding between them."""
    # on a CPU the operands stay in fp32, and oneDNN rounds them inside the product
    low, budget = weight, tdpo.CHUNK_BYTES // 4
    if hidden.is_cuda:
        low, budget = weight.bfloat16(), tdpo.CHUNK_BYTES
    rows = max(1, budget // (4 * len(weight)))
    rounded, d_weight = weight.bfloat16(), torch.zeros_like(weight)
    with torch.autocast(DEVICE, enabled=False), torch.backends.mkldnn.flags(None, None, None, "bf16"):
        for h, ref_h in zip(hidden.split(rows), ref_hidden.split(rows)):
            d_logits = tdpo._product(h.to(low.dtype), low.T, torch.float32).bfloat16()
            tdpo._product(ref_h.to(low.dtype), low.T, torch.float32)
            d_logits @ rounded
            d_weight += tdpo._product(d_logits.T, h.bfloat16(), torch.float32)


# N tokens in pairs of two responses of 64; 2 N tokens in such pairs, and in one pair
FORMS = {"products": products, "fused": fused, "naive": naive, "short pairs": fused, "one long pair": fused}


def loss_case(N, V, d, response, device):
    """Inputs of the loss layer, as `fused_tdpo_loss` takes them: N tokens in pairs of two equally long responses, fp32
    weights (V, d), and a policy a little off its reference."""
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    hidden, weight = draw(N, d), draw(V, d) * 2 / d**0.5
    labels = torch.randint(0, V, (N,), generator=generator, device=device)
    case = [hidden.requires_grad_(), weight.requires_grad_(), hidden.detach() + 0.05 * draw(N, d),
            weight.detach().clone(), labels]
    token = torch.arange(N)
    pair, chosen = token // (2 * response), token % (2 * response) < response
    return *case, pair, chosen


def card():
    """The full name of the GPU, or cpu."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def wait():
    """Wait until the device has done its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def time_loss(form, case):
    """Seconds of one forward and backward pass."""
    began = time.perf_counter()
    with torch.autocast(DEVICE, torch.bfloat16), torch.set_grad_enabled(form != "products"):
        loss = FORMS[form](*case)
    if form != "products":
        loss.backward()
    wait()
    return time.perf_counter() - began


def bench_loss(form, N, V, d):
    """{seconds, tflops, gib}: the median of three passes after two that warm up, and the extra memory. On a GPU that is
    the peak beyond the inputs; on a CPU, beyond the peak of a pass over 256 tokens, which has the weights' gradient."""
    response = 64
    if "pair" in form:
        N *= 2
    if form == "one long pair":
        response = N // 2
    case = loss_case(N, V, d, response, DEVICE)

    # a small pass of whole pairs first, so that compiling does not count as memory
    hidden, weight, ref_hidden, ref_weight, labels, _, _ = case
    n = min(N, 256)
    *_, pair, chosen = loss_case(n, 1, 1, 64, "cpu")
    time_loss(form, (hidden[:n], weight, ref_hidden[:n], ref_weight, labels[:n], pair, chosen))
    before = train.peak_gib(DEVICE)
    if DEVICE == "cuda":
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**30

    times = [time_loss(form, case) for _ in range(4)]
    seconds = float(np.median(times[1:]))
    return {"seconds": seconds, "tflops": 8e-12 * N * V * d / seconds, "gib": train.peak_gib(DEVICE) - before}


def bench_forms(N, V, d, *forms):
    """{form: the result of bench_loss}, in one process."""
    found = {}
    for form in forms:
        try:
            found[form] = bench_loss(form, N, V, d)
        except torch.OutOfMemoryError as error:
            found[form] = {"failed": str(error)}
    return found


# -----------------------------------------------------------------------------
# the day's items: tests, the loss layer, steps of train.py and of TRL on random weights

# dense bf16 FLOP/s of cards by their full names, from NVIDIA's data sheets
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12, "NVIDIA H200 NVL": 835e12,
    "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12,
}


def gemma(vocabulary, width, middle, layers, head):
    """Gemma 3 with full attention in every layer."""
    return hf.Gemma3TextConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=middle, head_dim=head,
                               num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=1,
                               sliding_window=16384, layer_types=["full_attention"] * layers)


MODELS = {
    "gpt2-large": hf.GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "7B": llama(4096, 11008, 32),
    "gemma-3-1b": gemma(262144, 1152, 6912, 26, 256),
    "toy": hf.GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=2),
    "toy gemma": gemma(2048, 32, 48, 2, 8),
}
# tokens of prompt, chosen and rejected; empty: as in HH
HH, LONG = (), (512, 7680, 7680)


def bench_tests(expression):
    """Run the tests of test_tdpo.py that the expression selects. RuntimeError: one of them fails, or none is run."""
    import pytest

    class Count:
        passed = 0

        def pytest_runtest_logreport(self, report):
            self.passed += report.when == "call" and report.passed
    count = Count()
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-k", expression, "test_tdpo.py"], plugins=[count])
    if code != 0 or count.passed == 0:
        raise RuntimeError(f"{count.passed} tests passed, and pytest ended with {code}")
    return {"passed": count.passed}


def random_model(name, device=DEVICE):
    """(model, tokenizer): random weights in fp32 on the device, and the words of the embedded task."""
    _, tokenizer = scratch_model(0)
    torch.manual_seed(0)
    config = MODELS[name]
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    with torch.device(device):
        return build(config), tokenizer


def mfu(model, tokens_per_s, labels_per_s, adapters, peak):
    """The share of the peak FLOP/s that training steps of a model reach. labels_per_s counts the response tokens, which
    are the only ones that the output layer sees."""
    outer = {id(x.weight): x.weight for x in (model.get_input_embeddings(), model.get_output_embeddings())}
    body = sum(p.numel() for p in model.parameters()) - sum(weight.numel() for weight in outer.values())
    head = model.get_output_embeddings().weight.numel()
    # for each weight and token: 2 in the policy's forward pass, 4 in its backward pass, 2 in the reference's forward
    # pass. Adapters leave the output layer without a gradient, which takes 2
    head_flops = 6 if adapters else 8
    return (8 * body * tokens_per_s + head_flops * head * labels_per_s) / peak


def random_pairs(count, sizes):
    """Pairs of random words. HH's prompts have a median of 100 tokens, and its responses of 65."""
    _, tokenizer = scratch_model(0)
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        lengths = sizes or np.exp(rng.normal((4.6, 4.2, 4.2), (0.8, 0.7, 0.7))).clip(2, 400).astype(int)
        texts = [" ".join(tokenizer.convert_ids_to_tokens(rng.integers(2, len(tokenizer), n))) for n in lengths]
        rows.append({"prompt": texts[0], "chosen": " " + texts[1], "rejected": " " + texts[2]})
    return rows


class Enough(Exception):
    """Ends a run before it saves its model."""


def bench_steps(name, steps, batch, sizes, *options):
    """Steps of train.py: medians over those between the third and the last two, and the largest costs of the last."""
    folder, said = tempfile.mkdtemp(), io.StringIO()
    with open(folder + "/pairs.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in random_pairs(steps * batch + 40, sizes))
    profiler = torch.profiler.profile()

    # the end of each step, and of its losses the beginning, the end and the number of tokens
    calls, ends = [], []
    fused_loss = tdpo.fused_tdpo_loss

    def timed_loss(hidden, *args, **kwargs):
        begin = moment()
        result = fused_loss(hidden, *args, **kwargs)
        calls.append((begin, moment(), len(hidden)))
        return result

    def after_step(*_):
        ends.append((moment(), calls.copy()))
        calls.clear()
        if len(ends) == steps - 1:
            profiler.start()
        if len(ends) == steps:
            raise Enough
    tdpo.fused_tdpo_loss = timed_loss
    sample.load_model = lambda *args, **kwargs: random_model(name)
    register_optimizer_step_post_hook(after_step)
    sys.argv = ["train.py", f"--init_from={name}", f"--data={folder}/pairs.jsonl", f"--max_steps={steps}",
                f"--batch_size={batch}", "--eval_pairs=8", "--eval_interval=0", "--save_interval=0", "--bad_rows=0",
                f"--out_dir={folder}/run", *options]
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(os.path.join(PROJECT, "train.py"), run_name="__main__")
    except Enough:
        wait()
        profiler.stop()
    finally:
        print(said.getvalue())

    log = [record for record in read_log(folder + "/run") if "loss" in record][3:-1]
    shutil.rmtree(folder)
    # the same steps: how full the rows are, the loss's share of the time, and MFU on a card that is known
    peak = PEAK_FLOPS.get(card())
    model, _ = random_model(name, "meta")
    row_tokens = int(re.search(r"rows: up to (\d+) tokens", said.getvalue())[1])
    adapters = any("--lora_rank" in option for option in options)
    for record, (begin, _), (end, losses) in zip(log, ends[2:], ends[3:]):
        steps_per_s = record["pairs_per_s"] / batch
        record["full"] = record["tokens_per_s"] / steps_per_s / (len(losses) * row_tokens)
        record["loss_share"] = sum(seconds(a, b) for a, b, _ in losses) / seconds(begin, end)
        record["gib"] = record["peak_gib"]
        if peak:
            labels_per_s = sum(count for _, _, count in losses) * steps_per_s
            record["mfu"] = mfu(model, record["tokens_per_s"], labels_per_s, adapters, peak)
    found = {key: float(np.median([x[key] for x in log])) for key in COLUMNS if key in log[0]}
    return {**found, "costs": costs(profiler)}


def moment():
    """A point in time: on a GPU, in the queue of its work."""
    if DEVICE != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(begin, end):
    """Seconds from one moment to a later one; the work between them must be done."""
    return begin.elapsed_time(end) / 1000 if DEVICE == "cuda" else end - begin


def costs(profiler):
    """The five largest costs, as text: a GPU's kernels, elsewhere operations."""
    kind = torch.autograd.DeviceType.CUDA if DEVICE == "cuda" else torch.autograd.DeviceType.CPU
    events = []
    for x in profiler.key_averages():
        if x.device_type == kind and not x.is_user_annotation:
            events.append((x.self_device_time_total or x.self_cpu_time_total, x.count, x.key[:90]))
    total = sum(cost for cost, _, _ in events)
    return [f"{cost / 1000:.1f} ms, {cost / total:.0%}, {count} x {key}" for cost, count, key in sorted(events)[:-6:-1]]


def bench_trl(name, steps, batch, accumulate, sizes):
    """Steps of TRL's DPOTrainer with its defaults, in bf16."""
    from trl import DPOConfig, DPOTrainer
    from datasets import Dataset
    folder, ends = tempfile.mkdtemp(), []

    class Watch(hf.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            wait()
            ends.append(time.perf_counter())
    args = DPOConfig(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, bf16=True,
                     max_steps=steps, max_length=512, optim="rmsprop", report_to=[], save_strategy="no",
                     use_cpu=DEVICE != "cuda")
    (model, tokenizer), (ref, _) = random_model(name), random_model(name)
    DPOTrainer(model, ref, args, train_dataset=Dataset.from_list(random_pairs(steps * batch * accumulate, sizes)),
               processing_class=tokenizer, callbacks=[Watch()]).train()
    shutil.rmtree(folder)
    return {"pairs_per_s": batch * accumulate / float(np.median(np.diff(ends[2:]))), "gib": train.peak_gib(DEVICE)}


# -----------------------------------------------------------------------------
# the day

# items in order of worth, {name: (the seconds that it may take, goals and public figures, function, arguments)}. On a
# GPU the seconds add up to less than twelve minutes
DAYS = {}
DAYS["gpu"] = {
    "tests of compiled rows": (100, "all pass", bench_tests, ("gpu_compiled_flex",)),
    "tests of the fused loss": (40, "all pass", bench_tests, ("gpu_fused",)),
    "loss, V 151936, d 4096": (
        40, "500 TFLOP/s; an H100, without a reference (6 of these 8 NVd): products 0.042 s, naive 0.059, TRL 0.167, "
        "Liger 0.192", bench_forms, (8192, 151936, 4096, "products", "fused", "naive")),
    "TRL, gpt2-large, HH, 1 x 8": (50, "", bench_trl, ("gpt2-large", 12, 1, 8, HH)),
    "gpt2-large, HH": (120, "MFU 0.5, 3 x TRL", bench_steps, ("gpt2-large", 12, 64, HH)),
    "TRL, gpt2-large, HH, 8 x 1": (40, "", bench_trl, ("gpt2-large", 12, 8, 1, HH)),
    "7B, adapters, HH": (100, "MFU 0.5", bench_steps, ("7B", 10, 64, HH, "--lora_rank=16")),
    "loss, V 262144, d 1152": (
        40, "500 TFLOP/s; one long pair takes no more GiB than short ones", bench_forms,
        (8192, 262144, 1152, "products", "fused", "short pairs", "one long pair")),
    "test of a compiled run": (60, "passes", bench_tests, ("gpu_compiled_run",)),
    "gemma-3-1b, 2 x 8192 tokens": (80, "MFU 0.5; TRL 12.0 GiB", bench_steps, (
        "gemma-3-1b", 8, 1, LONG, "--max_length=8200", "--checkpoint_activations=True")),
    "loss, V 50257, d 1280": (30, "500 TFLOP/s", bench_forms, (8192, 50257, 1280, "products", "fused", "naive")),
}
DAYS["loss"] = {f"loss, {form}": (200, "", bench_loss, (form, 4096, 50257, 768)) for form in FORMS}
DAYS["toy"] = {
    "tests": (60, "all pass", bench_tests, ("row_is_what_is_drawn",)),
    "loss": (60, "500 TFLOP/s", bench_forms, (256, 2048, 32, *FORMS)),
    "HH": (60, "MFU 0.5", bench_steps, ("toy", 6, 4, HH)),
    "TRL": (60, "", bench_trl, ("toy", 4, 2, 2, HH)),
    "adapters": (60, "", bench_steps, ("toy gemma", 6, 1, (20, 580, 580), "--max_length=601", "--lora_rank=4",
                                       "--checkpoint_activations=True")),
}
COLUMNS = "passed pairs_per_s tokens_per_s mfu tflops seconds gib loss_share full".split()


def report(items, found):
    """The results in Markdown: a table, the costs of steps, and what is missing."""
    lines = ["| | " + " | ".join(COLUMNS) + " | goal |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, values in found.items():
        # the loss has several forms
        parts = {f"{name}: {form}": x for form, x in values.items() if isinstance(x, dict)} or {name: values}
        for part, numbers in parts.items():
            cells = [f"{numbers[key]:.4g}" if key in numbers else "" for key in COLUMNS]
            if "failed" in numbers:
                cells[0] = "failed: " + " ".join(numbers["failed"].replace("|", "/").split())[-200:]
            lines.append(f"| {part} | {' | '.join(cells)} | {items[name][1]} |")
    for name, values in found.items():
        if "costs" in values:
            lines += ["", f"{name}, the largest costs of a step:", "", *["- " + line for line in values["costs"]]]
    missing = [name for name in items if name not in found]
    return "\n".join([*lines, "", f"missing: {'; '.join(missing) or 'nothing'}", ""])


def run_day(folder, kind):
    """{name: the result} of all items that this day and those before it on this card have reached."""
    items = DAYS[kind]
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{kind}-{card()}".replace(" ", "-"))
    found = {}
    if os.path.exists(path + ".json"):
        with open(path + ".json") as f:
            found = json.load(f)

    # what was not reached before, and then what failed
    waiting = [name for name in items if name not in found]
    waiting += [name for name in items if "failed" in found.get(name, {})]
    for name in waiting:
        began = time.time()
        limit, _, measure, args = items[name]
        try:
            result = apart(limit, measure, *args)
        except RuntimeError as error:
            result = {"failed": str(error)}
        result.update(took=time.time() - began, torch=torch.__version__, transformers=hf.__version__)
        found[name] = result

        # at once, because the machine may be gone before the next one
        for suffix, text in ((".json", json.dumps(found, indent=1)), (".md", report(items, found))):
            with open(path + ".new", "w") as f:
                f.write(text)
            os.replace(path + ".new", path + suffix)
        print(f"{name}: {result}", flush=True)
    print(report(items, found))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m extras.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*DAYS, "one"])
    parser.add_argument("folder", nargs="+")
    kind, rest = vars(parser.parse_args()).values()
    if kind == "one":
        # for `apart`
        result = globals()[rest[0]](*json.loads(rest[1]))
        print("\nresult: " + json.dumps(result))
    elif kind == "gpu" and DEVICE != "cuda":
        sys.exit("error: torch sees no GPU here")
    else:
        run_day(rest[0], kind)
