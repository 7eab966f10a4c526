"""Benchmarks: the loss layer, and the runs that have to be measured on a GPU.

    python -m extras.bench                      # the loss layer: 4096 tokens, vocabulary 50257, width 768
    python -m extras.bench 8192 151936 1024     # the loss layer at other sizes
    python -m extras.bench gpu FOLDER           # on a GPU: the loss layer, and runs of train.py

The last one writes FOLDER/CARD.json after each measurement. Started again, it continues with those that failed or that
are missing.
"""
import argparse
import json
import os
import runpy
import subprocess
import sys
import time

import train        # before torch, because it sets up the memory of the process
import numpy as np
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

import tdpo
from eval_imdb import read_log, scratch_model
from extras.compare import PROJECT
from extras.memory import qwen
from sample import DEVICES

# a measurement that takes longer than this many seconds has failed
SECONDS = 600


def apart(measure, *args):
    """The result of a function of this file, run in a process of its own, so that no measurement finds the memory or
    the compiled code of a different one. RuntimeError: the last words of a process that failed."""
    command = [sys.executable, "-m", "extras.bench", "one", measure.__name__, json.dumps(args)]
    try:
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it did not end within {SECONDS} seconds") from None
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    # the last line, because what it measures may print, too
    return json.loads(done.stdout.splitlines()[-1])


def show(*cells):
    """Print a row of a table."""
    texts = []
    for x in cells:
        if isinstance(x, float):
            x = f"{x:.4g}"
        texts.append(str(x))
    print("| " + " | ".join(texts) + " |", flush=True)


# -----------------------------------------------------------------------------
# the loss layer, forward and backward under bf16 autocast


def unfused(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen):
    """The naive form: logits of all N response tokens at once, N x V."""
    tokens = tdpo.token_stats(hidden @ weight.T, ref_hidden @ ref_weight.T, labels)
    sequence = (2 * pair + chosen).to(hidden.device)
    sums = tdpo.sum_tokens(tokens, labels, sequence, 2 * int(pair[-1]) + 2)
    w, l = tdpo.Sums(*[x[1::2] for x in sums]), tdpo.Sums(*[x[0::2] for x in sums])
    losses, _ = tdpo.preference_loss("tdpo2", w, l)
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
    with torch.autocast(hidden.device.type, enabled=False), torch.backends.mkldnn.flags(None, None, None, "bf16"):
        for h, ref_h in zip(hidden.split(rows), ref_hidden.split(rows)):
            d_logits = product(h.to(low.dtype), low.T).bfloat16()
            product(ref_h.to(low.dtype), low.T)
            d_logits @ rounded
            d_weight += product(d_logits.T, h.bfloat16())


def product(a, b):
    """a @ b in fp32; on a GPU also of bf16 operands."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


FORMS = {"products": products, "fused": fused, "unfused": unfused}


def loss_case(N, V, d, response, device):
    """Inputs of the loss layer, as `fused_tdpo_loss` takes them: N tokens in pairs of two equally long responses, fp32
    weights (V, d), and a policy a little off its reference."""
    generator = torch.Generator().manual_seed(0)
    hidden, noise = torch.randn(2, N, d, generator=generator).unbind()
    weight = torch.randn(V, d, generator=generator) * 2 / d**0.5
    labels = torch.randint(0, V, (N,), generator=generator)
    case = [x.to(device) for x in (hidden, weight, hidden + 0.05 * noise, weight.clone(), labels)]
    for x in case[:2]:
        x.requires_grad_()
    token = torch.arange(N)
    pair, chosen = token // (2 * response), token % (2 * response) < response
    return *case, pair, chosen


def time_loss(form, case):
    """Seconds of one forward and backward pass."""
    device = case[0].device.type
    began = time.perf_counter()
    with torch.autocast(device, torch.bfloat16), torch.set_grad_enabled(form != "products"):
        loss = FORMS[form](*case)
    if form != "products":
        loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def bench_loss(form, N, V, d, response=64):
    """{seconds, tflops, gib}: the median of three passes after two that warm up, and the extra memory. On a GPU that is
    the peak beyond the inputs; on a CPU, beyond the peak of a pass over 256 tokens, which has the weights' gradient."""
    device = DEVICES[0]
    case = loss_case(N, V, d, response, device)

    # a small pass of whole pairs first, so that compiling does not count as memory
    hidden, weight, ref_hidden, ref_weight, labels, _, _ = case
    n = min(N, 256)
    *_, pair, chosen = loss_case(n, 1, 1, 64, "cpu")
    time_loss(form, (hidden[:n], weight, ref_hidden[:n], ref_weight, labels[:n], pair, chosen))
    before = train.peak_gib(device)
    if device == "cuda":
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**30

    times = [time_loss(form, case) for _ in range(4)]
    seconds = float(np.median(times[1:]))
    return {"seconds": seconds, "tflops": 8e-12 * N * V * d / seconds, "gib": train.peak_gib(device) - before}


def bench_layer(N=4096, V=50257, d=768):
    """Print the three forms beside each other, and a long pair beside short ones."""
    print(f"torch {torch.__version__}, {DEVICES[0]}, {torch.get_num_threads()} threads")
    show("N", "V", "d", "form", "s", "TFLOP/s", "extra GiB")
    show(*["---"] * 7)
    found = {}
    for form in FORMS:
        found[form] = apart(bench_loss, form, N, V, d)
        show(N, V, d, form, *found[form].values())
    print(f"fused: {found['fused']['seconds'] / found['products']['seconds']:.2f} times the seconds of its products, "
          f"{found['fused']['gib'] / found['unfused']['gib']:.3f} of the unfused form's extra memory\n")

    # the memory must not depend on how long a pair is: 64 pairs of 2 x 64 tokens, and one with as many tokens
    short = apart(bench_loss, "fused", 8192, V, d, 64)["gib"]
    long = apart(bench_loss, "fused", 8192, V, d, 4096)["gib"]
    print(f"fused, 8192 tokens: one long pair takes {long:.3f} GiB extra, 64 short pairs {short:.3f}, which is "
          f"{long / short:.2f} times as much")


# -----------------------------------------------------------------------------
# the items of the day: the tests that need a GPU, the loss layer, steps of train.py, and steps of TRL


class Enough(Exception):
    """Ends a run before it saves its model."""


MODELS = {
    "gpt2-large": hf.GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "7B": llama(4096, 11008, 32),
    # full attention in every layer
    "gemma-3-1b": hf.Gemma3TextConfig(vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
                                      num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=None,
                                      layer_types=["full_attention"] * 26),
    "toy": hf.GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=2),
}


def bench_tests(expression):
    """{passed}: how many of the tests of test_tdpo.py that the expression selects have passed. RuntimeError: not all."""
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


def bench_forms(V, d, N, cases):
    """{name: the result} of bench_loss for each case: its name, its form, how many times N tokens, and how many of them
    a response has."""
    found = {}
    for name, form, times, response in cases:
        try:
            found[name] = bench_loss(form, times * N, V, d, response)
        except torch.OutOfMemoryError as error:
            found[name] = {"failed": str(error)}
        torch.cuda.empty_cache()
    return found


def random_model(name):
    """(model, tokenizer): random weights in fp32 on the device, and the words of the embedded task."""
    _, tokenizer = scratch_model(0)
    torch.manual_seed(0)
    config = copy.deepcopy(MODELS[name])
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    with torch.device(DEVICES[0]):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), tokenizer


def random_pairs(path, count, lengths):
    """Write pairs of random words. lengths: of prompt, chosen and rejected; if empty, as HH's: prompts of 100 tokens and
    responses of 65 in the middle."""
    _, tokenizer = scratch_model(0)
    rng = np.random.default_rng(0)
    with open(path, "w") as f:
        for _ in range(count):
            if lengths:
                sizes = lengths
            else:
                sizes = np.exp(rng.normal((4.6, 4.2, 4.2), (0.8, 0.7, 0.7))).clip(2, 400).astype(int)
            words = [tokenizer.convert_ids_to_tokens(rng.integers(2, len(tokenizer), n)) for n in sizes]
            prompt, chosen, rejected = map(" ".join, words)
            f.write(json.dumps({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}) + "\n")


def moment():
    """A point in time: on a GPU in the queue of its work."""
    if DEVICES[0] != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin, end):
    """Seconds from one moment to the next. On a GPU its work has to be done."""
    return begin.elapsed_time(end) / 1000 if DEVICES[0] == "cuda" else end - begin


def bench_steps(name, steps, batch, lengths, *options):
    """Steps of train.py with a model of random weights: medians after the first three, and the last one's profile."""
    sample.load_model = lambda *args, **kwargs: random_model(name)
    folder = tempfile.mkdtemp()
    random_pairs(folder + "/pairs.jsonl", steps * batch + 40, lengths)

    # each call of the loss, and each step with the calls in it
    fused_loss, calls, marks = tdpo.fused_tdpo_loss, [], []
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICES[0] == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)

    def timed_loss(*args, **kwargs):
        begin = moment()
        result = fused_loss(*args, **kwargs)
        calls.append((begin, moment()))
        return result

    def after_step(*_):
        marks.append((moment(), calls.copy()))
        calls.clear()
        if len(marks) == steps - 1:
            profiler.start()
        if len(marks) == steps:
            raise Enough
    tdpo.fused_tdpo_loss = timed_loss
    register_optimizer_step_post_hook(after_step)
    sys.argv = ["train.py", f"--init_from={name}", f"--data={folder}/pairs.jsonl", f"--max_steps={steps}",
                f"--batch_size={batch}", "--eval_pairs=8", "--eval_interval=0", "--save_interval=0", "--bad_rows=0",
                f"--out_dir={folder}/run", *options]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(os.path.join(PROJECT, "train.py"), run_name="__main__")
    except Enough:
        if DEVICES[0] == "cuda":
            torch.cuda.synchronize()
        profiler.stop()
    finally:
        print(said.getvalue())

    log = [record for record in read_log(folder + "/run") if "loss" in record][3:]
    found = {}
    for key in ("pairs_per_s", "tokens_per_s", "mfu", "peak_gib"):
        if key in log[-1]:
            found[key] = float(np.median([record[key] for record in log]))
    # of the same steps the loss's share of the time, and how full the rows are
    row_tokens = int(re.search(r"rows: up to (\d+) tokens", said.getvalue())[1])
    shares, full = [], []
    for record, (begin, _), (end, losses) in zip(log, marks[2:], marks[3:]):
        shares.append(sum(between(*call) for call in losses) / between(begin, end))
        full.append(record["tokens_per_s"] / record["pairs_per_s"] * batch / (len(losses) * row_tokens))
    shutil.rmtree(folder)
    return {**found, "loss_share": float(np.median(shares)), "full": float(np.median(full)), "costs": costs(profiler)}


def costs(profiler):
    """The five largest costs of what was profiled, as lines: on a GPU its kernels, elsewhere operations."""
    events = profiler.key_averages()
    if DEVICES[0] == "cuda":
        events = [x for x in events if x.device_type == torch.autograd.DeviceType.CUDA]
    sizes = sorted(((x.self_device_time_total or x.self_cpu_time_total, x.key, x.count) for x in events), reverse=True)
    total = sum(size for size, _, _ in sizes)
    return [f"{size / 1000:.1f} ms, {size / total:.0%}, {count} x {key[:90]}" for size, key, count in sizes[:5]]


def bench_trl(name, steps, batch, accumulate, lengths):
    """Steps of TRL's DPOTrainer as it comes, in bf16, with as many pairs in a step as batch times accumulate."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    folder, marks = tempfile.mkdtemp(), []
    random_pairs(folder + "/pairs.jsonl", steps * batch * accumulate, lengths)
    with open(folder + "/pairs.jsonl") as f:
        rows = Dataset.from_list([json.loads(line) for line in f])

    class Watch(hf.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if DEVICES[0] == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
    args = DPOConfig(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, bf16=True,
                     max_steps=steps, max_length=512, optim="rmsprop", report_to=[], save_strategy="no",
                     use_cpu=DEVICES[0] != "cuda")
    (model, tokenizer), (ref, _) = random_model(name), random_model(name)
    DPOTrainer(model=model, ref_model=ref, args=args, train_dataset=rows, processing_class=tokenizer,
               callbacks=[Watch()]).train()
    shutil.rmtree(folder)
    seconds = float(np.median(np.diff(marks[2:])))
    return {"pairs_per_s": batch * accumulate / seconds, "peak_gib": train.peak_gib(DEVICES[0])}


# -----------------------------------------------------------------------------
# the day

# seconds of a whole day, and how much of it an item needs at least
DAY, LEAST = 720, 20

FORMS_OF_DAY = (("products", "products", 1, 64), ("fused", "fused", 1, 64), ("naive", "unfused", 1, 64))
# as many tokens in short pairs and in one pair
LENGTHS_OF_DAY = (("products", "products", 1, 64), ("fused", "fused", 1, 64), ("short pairs", "fused", 2, 64),
                  ("one long pair", "fused", 2, 8192))
HH, LONG = (), (512, 7680, 7680)
HH_GOAL, FUSED_GOAL = "MFU 0.5; 3 x TRL", "fused 500 TFLOP/s"

# in order of worth: {name: (seconds it may take, goal, function, arguments)}
ITEMS = {
    "tests: compiled rows": (120, "all pass", bench_tests, ("gpu_compiled_flex",)),
    "tests: fused loss": (60, "all pass", bench_tests, ("gpu_fused",)),
    "loss, V 151936, d 4096": (60, FUSED_GOAL, bench_forms, (151936, 4096, 8192, FORMS_OF_DAY)),
    "gpt2-large, HH": (120, HH_GOAL, bench_steps, ("gpt2-large", 12, 64, HH)),
    "TRL, gpt2-large, HH, 1 x 8": (75, "", bench_trl, ("gpt2-large", 12, 1, 8, HH)),
    "7B, adapters, HH": (150, "MFU 0.5", bench_steps, ("7B", 10, 64, HH, "--lora_rank=16")),
    "loss, V 262144, d 1152": (60, FUSED_GOAL, bench_forms, (262144, 1152, 8192, LENGTHS_OF_DAY)),
    "tests: compiled run": (100, "all pass", bench_tests, ("gpu_compiled_run",)),
    "gemma-3-1b, 2 x 8192 tokens": (120, "MFU 0.5", bench_steps, (
        "gemma-3-1b", 8, 1, LONG, "--max_length=8200", "--checkpoint_activations=True")),
    "gpt2-large, HH, again": (75, HH_GOAL, bench_steps, ("gpt2-large", 12, 64, HH)),
    "TRL, gpt2-large, HH, 8 x 1": (75, "", bench_trl, ("gpt2-large", 12, 8, 1, HH)),
    "loss, V 50257, d 1280": (45, FUSED_GOAL, bench_forms, (50257, 1280, 8192, FORMS_OF_DAY)),
}
# the same on any device, in seconds
TOY_ITEMS = {
    "tests": (60, "all pass", bench_tests, ("row_is_what_is_drawn",)),
    "loss": (60, FUSED_GOAL, bench_forms, (2048, 32, 256, (*FORMS_OF_DAY, ("one long pair", "fused", 2, 256)))),
    "toy, HH": (60, HH_GOAL, bench_steps, ("toy", 6, 4, HH)),
    "TRL, toy, HH, 2 x 2": (60, "", bench_trl, ("toy", 4, 2, 2, HH)),
    "toy, adapters, 2 x 600 tokens": (60, "MFU 0.5", bench_steps, (
        "toy", 6, 1, (20, 580, 580), "--max_length=601", "--lora_rank=4", "--checkpoint_activations=True")),
}
COLUMNS = ("pairs_per_s", "tokens_per_s", "mfu", "tflops", "seconds", "gib", "peak_gib", "loss_share", "full", "passed")


def report(items, found):
    """The results as lines of Markdown."""
    lines = ["| item | " + " | ".join(COLUMNS) + " | goal |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, values in found.items():
        # the loss layer has several forms
        parts = {f"{name}: {form}": part for form, part in values.items() if isinstance(part, dict)}
        for part, numbers in (parts or {name: values}).items():
            cells = [f"{numbers[key]:.4g}" if key in numbers else "" for key in COLUMNS]
            if "failed" in numbers:
                cells[0] = "failed: " + numbers["failed"].replace("\n", " ").replace("|", "/")[-200:]
            lines.append(f"| {part} | {' | '.join(cells)} | {items[name][1]} |")
    lines.append("")

    # beside TRL the slower of our runs and its faster one; one long pair beside as many tokens in short ones
    ours, theirs = [], []
    for name, values in found.items():
        if "pairs_per_s" in values and name.startswith("TRL"):
            theirs.append(values["pairs_per_s"])
        elif "pairs_per_s" in values and items[name][1] == HH_GOAL:
            ours.append(values["pairs_per_s"])
        if "gib" in values.get("one long pair", {}) and "gib" in values.get("short pairs", {}):
            lines.append(f"{name}: one long pair takes {values['one long pair']['gib']:.2f} GiB, short pairs "
                         f"{values['short pairs']['gib']:.2f} (goal: no more)\n")
    if ours and theirs:
        lines.append(f"HH: {min(ours) / max(theirs):.2f} times TRL's pairs/s (goal: 3)\n")
    lines.append("Public figures, one H100, V 151936, d 4096, 8192 tokens, one model (three products, here four with the "
                 "reference's): bare products 42 ms, naive 59, TRL 167, Liger 192. TRL's fused loss with gemma-3-1b at "
                 "8192 tokens: 12.0 GiB.\n")
    for name, values in found.items():
        if "costs" in values:
            lines += [f"{name}, largest costs of a step:", "", *["- " + line for line in values["costs"]], ""]
    waiting = [name for name in items if name not in found]
    if waiting:
        lines.append("Not measured yet: " + "; ".join(waiting))
    return lines


def gpu_day(folder, items=ITEMS, seconds=DAY):
    """{name: the result} of all items. One that fails says why, and the others go on."""
    end = time.time() + seconds
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if card == "cpu" and items is ITEMS:
        sys.exit("error: torch sees no GPU here")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(os.path.abspath(folder), card.replace(" ", "-"))
    found = {}
    if os.path.exists(path + ".json"):
        with open(path + ".json") as f:
            found = json.load(f)

    # what an earlier day on this card did not reach, then what failed there
    waiting = [name for name in items if name not in found]
    waiting += [name for name in items if "failed" in found.get(name, {})]
    for name in waiting:
        began = time.time()
        if end - began < LEAST:
            print("the day is over; the same command continues with what is left")
            break
        limit, _, measure, args = items[name]
        try:
            result = apart(measure, args, min(limit, end - began))
        except RuntimeError as error:
            result = {"failed": str(error)}
        found[name] = {**result, "took": time.time() - began, "torch": torch.__version__, "transformers": hf.__version__}
        found = {key: found[key] for key in items if key in found}

        # at once, because the machine may be gone before the next one
        for kind, text in ((".json", json.dumps(found, indent=1)), (".md", "\n".join(report(items, found)) + "\n")):
            with open(path + ".new", "w") as f:
                f.write(text)
            os.replace(path + ".new", path + kind)
        print(f"{name}: {found[name]}", flush=True)
    print("\n".join(report(items, found)))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m extras.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="nothing, N V d, or gpu FOLDER")
    what = parser.parse_args().what
    if what[:1] == ["gpu"] and len(what) == 2:
        gpu_day(what[1])
    elif what[:1] == ["toy"] and len(what) == 2:
        gpu_day(what[1], TOY_ITEMS)
    elif what[:1] == ["one"]:
        # for `apart`
        result = globals()[what[1]](*json.loads(what[2]))
        print("\n" + json.dumps(result))
    elif len(what) in (0, 3):
        bench_layer(*map(int, what))
    else:
        parser.error("give nothing, N V d, or gpu FOLDER")
