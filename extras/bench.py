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
# whole runs of train.py on a GPU

GPU_MODELS = {
    "0.6B": hf.Qwen3Config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                           num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
    "1.5B": qwen(1536, 8960, 28, 12),
}
TOY_MODELS = {
    "toy": hf.LlamaConfig(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512),
}


def random_model(folder, config, pairs):
    """Write a model of random weights in bf16 with the embedded task's tokenizer, and pairs as long as HH's: prompts of
    100 tokens and responses of 65 in the middle."""
    _, tokenizer = scratch_model(0)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)

    def random_words(n):
        return " ".join(tokenizer.convert_ids_to_tokens(rng.integers(2, len(tokenizer), n)))
    rng = np.random.default_rng(0)
    with open(folder + ".jsonl", "w") as f:
        for _ in range(pairs):
            lengths = np.exp(rng.normal((4.6, 4.2, 4.2), (0.8, 0.7, 0.7))).clip(2, 400).astype(int)
            prompt, chosen, rejected = [random_words(n) for n in lengths]
            f.write(json.dumps({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}) + "\n")


def bench_run(model, steps, *options):
    """Speed and memory of a run of train.py: medians of the steps that follow the first three."""
    folder = model + "-run"
    sys.argv = ["train.py", f"--init_from={model}", f"--data={model}.jsonl", f"--max_steps={steps}", "--bad_rows=0",
                "--eval_pairs=8", "--eval_interval=0", "--save_interval=0", "--max_new_tokens=1", f"--out_dir={folder}",
                "--overwrite=True", *options]
    runpy.run_path(os.path.join(PROJECT, "train.py"), run_name="__main__")
    log = [record for record in read_log(folder) if "loss" in record]
    found = {}
    for name in ("pairs_per_s", "mfu", "peak_gib"):
        if name in log[-1]:
            found[name] = float(np.median([record[name] for record in log[3:]]))
    return found


def day_items(folder, models, vocabularies, steps, batch, N, d):
    """{name: (function, its arguments)} of all measurements, in order."""
    items = {}
    for V in vocabularies:
        items[f"products, V {V}"] = bench_loss, ("products", N, V, d)
        items[f"fused, V {V}"] = bench_loss, ("fused", N, V, d)
    for name in models:
        model, size = os.path.join(folder, name), f"--batch_size={batch}"
        for rank in (0, 16):
            items[f"{name}, rank {rank}"] = bench_run, (model, steps, size, f"--lora_rank={rank}")
    return items


def gpu_day(folder, toy=False):
    """{name: the result of a measurement}. One that fails says why, and the others go on. toy: tiny sizes on any
    device, for a test."""
    models, vocabularies, steps, batch, N, d = GPU_MODELS, (50257, 128256, 151936), 12, 64, 8192, 1024
    card = "cpu"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    if toy:
        models, vocabularies, steps, batch, N, d = TOY_MODELS, (2048,), 5, 8, 128, 32
    elif card == "cpu":
        sys.exit("error: torch sees no GPU here")

    # the results of an earlier start, if it was on a card like this one
    folder = os.path.abspath(folder)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, card.replace(" ", "-") + ".json")
    found = {}
    if os.path.exists(path):
        with open(path) as f:
            found = json.load(f)
    for name, config in models.items():
        if not os.path.exists(os.path.join(folder, name + ".jsonl")):
            random_model(os.path.join(folder, name), config, pairs=(steps + 1) * batch + 100)

    for name, (measure, args) in day_items(folder, models, vocabularies, steps, batch, N, d).items():
        if name in found and "failed" not in found[name]:
            continue
        began = time.time()
        try:
            found[name] = apart(measure, *args)
        except RuntimeError as error:
            found[name] = {"failed": str(error)}
        found[name].update(took=time.time() - began, torch=torch.__version__)

        # at once, because the machine may be gone before the last one
        with open(path, "w") as f:
            json.dump(found, f, indent=1)
        print(f"{name}: {found[name]}", flush=True)

    show("measured", "pairs/s", "MFU", "TFLOP/s", "peak GiB")
    show(*["---"] * 5)
    for name, values in found.items():
        show(name, *[values.get(key, "") for key in ("pairs_per_s", "mfu", "tflops", "peak_gib")])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m extras.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="nothing, N V d, or gpu FOLDER")
    what = parser.parse_args().what
    if what[:1] == ["gpu"] and len(what) == 2:
        gpu_day(what[1])
    elif what[:1] == ["one"]:
        # for `apart`
        print("\n" + json.dumps(globals()[what[1]](*json.loads(what[2]))))
    elif len(what) in (0, 3):
        bench_layer(*map(int, what))
    else:
        parser.error("give nothing, N V d, or gpu FOLDER")
