"""Benchmarks: the loss layer, and all that has to be measured on a GPU.

    python -m extras.bench                      # the loss layer: 4096 tokens, vocabulary 50257, width 768
    python -m extras.bench 8192 151936 1024     # the loss layer at other sizes
    python -m extras.bench gpu FOLDER           # a GPU's day: its tests, the loss layer, runs beside TRL's, a profile

The GPU's day writes FOLDER/gpu.json and FOLDER/gpu.md after each item. Started again on the same card, it continues
with the items that failed or that were not reached in time.
"""
import collections
import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
import traceback

import train        # before torch, because it sets up the memory of the process
import numpy as np
import torch
import transformers as hf
from transformers import AutoModelForCausalLM, AutoTokenizer

import tdpo
from eval_imdb import read_log
from extras.memory import CHUNK_BYTES, qwen
from sample import DEVICES

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# what a measurement may take, in seconds, and the GPU's day, in minutes
SECONDS = 300
MINUTES = 25


# -----------------------------------------------------------------------------
# processes: each measurement has one of its own, so that none finds another's memory or compiled code

# on a CPU a server imports everything once and forks; a process that has seen a GPU must not fork
PROCESSES = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
PROCESSES.set_forkserver_preload(["train", "extras.memory"])


def apart(measure, *args, seconds=SECONDS):
    """measure(*args), run in a process of its own in this folder. RuntimeError: what went wrong there; TimeoutError."""
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=answer, args=(there, os.getcwd(), measure, args), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            raise TimeoutError(f"{measure.__name__} did not end within {seconds:.0f} seconds")
        result, error = here.recv()
        # time to clean up
        process.join(10)
    except EOFError:
        process.join()
        raise RuntimeError(f"{measure.__name__} died with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if error:
        raise RuntimeError(error)
    return result


def answer(pipe, folder, measure, args):
    """The other side of `apart`: send (result, "") or (None, the end of a traceback). What is printed is dropped."""
    os.chdir(folder)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            found = measure(*args), ""
    except (Exception, SystemExit):
        found = None, traceback.format_exc()[-2000:]
    pipe.send(found)


# -----------------------------------------------------------------------------
# the loss layer, forward and backward under bf16 autocast


def unfused(hidden, weight, ref_hidden, ref_weight, labels, pair, chosen):
    """The naive form: logits of all N response tokens at once, N x V."""
    tokens = tdpo.token_stats(hidden @ weight.T, ref_hidden @ ref_weight.T, labels)
    sequence = (2 * pair + chosen).to(hidden.device)
    sums = tdpo.sum_tokens(tokens, labels, sequence, 2 * int(pair[-1]) + 2)
    w, l = tdpo.Sums(*[x[1::2] for x in sums]), tdpo.Sums(*[x[0::2] for x in sums])
    return tdpo.preference_loss("tdpo2", w, l, beta=0.1, alpha=0.5).mean()


def fused(*case):
    loss, _ = tdpo.fused_tdpo_loss(*case)
    return loss


def products(hidden, weight, ref_hidden, *_):
    """The floor: the fused form's four products in its chunks and dtypes, and the rounding between them."""
    # on a CPU the operands stay in fp32, and oneDNN rounds them inside the product
    low, budget = weight, CHUNK_BYTES // 8
    if hidden.is_cuda:
        low, budget = weight.bfloat16(), CHUNK_BYTES
    rows = max(1, budget // (4 * len(weight)))
    rounded, d_weight = weight.bfloat16(), torch.zeros_like(weight)
    with torch.autocast(hidden.device.type, enabled=False), torch.backends.mkldnn.flags(None, None, None, "bf16"):
        for h, ref_h in zip(hidden.split(rows), ref_hidden.split(rows)):
            d_logits = product(h.to(low.dtype), low.T).bfloat16()
            product(ref_h.to(low.dtype), low.T)
            d_logits @ rounded
            d_weight += product(d_logits.T, h.bfloat16())


def product(a, b):
    """a @ b in fp32; of bf16 operands on a GPU, too."""
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
    return *case, *pairs_of(N, response)


def pairs_of(N, response):
    """Each token's pair, and whether it is of the chosen response, where both responses have so many tokens."""
    token = torch.arange(N)
    return token // (2 * response), token % (2 * response) < response


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
    small = slice(0, min(N, 256))
    pair, chosen = pairs_of(small.stop, 64)
    time_loss(form, (hidden[small], weight, ref_hidden[small], ref_weight, labels[small], pair, chosen))
    before = train.peak_gib(device)
    if device == "cuda":
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**30

    times = [time_loss(form, case) for _ in range(4)]
    seconds = float(np.median(times[1:]))
    tflops = 8e-12 * N * V * d / seconds
    return {"seconds": seconds, "tflops": tflops, "gib": train.peak_gib(device) - before}


def show(*cells):
    """Print a row of a table."""
    texts = []
    for x in cells:
        if isinstance(x, float):
            x = f"{x:.4g}"
        texts.append(str(x))
    print("| " + " | ".join(texts) + " |", flush=True)


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

    # the memory must not depend on how long a pair is: one of 2 x 4096 tokens, and 64 with as many tokens together
    extra = {}
    for name, response in (("short", 64), ("long", 4096)):
        extra[name] = apart(bench_loss, "fused", 8192, V, d, response)["gib"]
    print(f"fused, 8192 tokens: one long pair takes {extra['long']:.3f} GiB extra, 64 short pairs {extra['short']:.3f}")
    print(f"the long pair takes {extra['long'] / extra['short']:.2f} times as much")


# -----------------------------------------------------------------------------
# whole runs, of train.py and of TRL

GPU_MODELS = {
    "gpt2-large": hf.GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "0.6B": hf.Qwen3Config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                           num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
    "1.5B": qwen(1536, 8960, 28, 12),
}
TOY_MODELS = {
    "toy": hf.LlamaConfig(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512),
}


def numbers_model(folder, config, pairs):
    """Write a model of random weights in bf16 whose words are numbers, and pairs as long as HH's: prompts of 100 tokens
    and responses of 65 in the middle."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = {"<eos>": 0}
    words.update({str(n): n for n in range(1, 1000)})
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    hf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)

    rng = np.random.default_rng(0)
    with open(folder + ".jsonl", "w") as f:
        for _ in range(pairs):
            lengths = np.exp(rng.normal((4.6, 4.2, 4.2), (0.8, 0.7, 0.7))).clip(2, 400).astype(int)
            prompt, chosen, rejected = [" ".join(map(str, rng.integers(1, 1000, n))) for n in lengths]
            f.write(json.dumps({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected}) + "\n")


def compile_eagerly():
    """From here on torch.compile has no compiler behind it; more graphs than its limit are an error."""
    torch.compile = functools.partial(torch.compile, backend="eager")
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 3


def bench_run(model, steps, *options):
    """Speed, memory and losses of a run of train.py: medians of the steps that follow the first three."""
    if not torch.cuda.is_available():
        compile_eagerly()
    sys.argv = ["train.py", f"--init_from={model}", f"--data={model}.jsonl", f"--max_steps={steps}", "--bad_rows=0",
                "--eval_pairs=8", "--eval_interval=0", "--save_interval=0", "--out_dir=run", "--overwrite=True",
                *options]
    runpy.run_path(os.path.join(HERE, "train.py"), run_name="__main__")
    log = [record for record in read_log("run") if "loss" in record]
    found = {"losses": [record["loss"] for record in log]}
    for name in ("pairs_per_s", "mfu", "peak_gib"):
        if name in log[-1]:
            found[name] = float(np.median([record[name] for record in log[3:]]))
    return found


def bench_trl(model, steps, batch, rank):
    """The same of TRL's DPOTrainer: micro-batches of 8 pairs, without gradient checkpointing."""
    import trl
    from datasets import Dataset
    times = []

    class Timer(hf.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())
    load = functools.partial(AutoModelForCausalLM.from_pretrained, model, dtype=torch.float32)
    adapters, ref = None, None
    if rank:
        import peft
        adapters = peft.LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear")
    else:
        ref = load()
    settings = trl.DPOConfig(output_dir="trl", per_device_train_batch_size=8, gradient_accumulation_steps=batch // 8,
                             max_steps=steps, bf16=True, optim="rmsprop", max_length=512, report_to=[],
                             gradient_checkpointing=False, save_strategy="no", use_cpu=not torch.cuda.is_available())
    with open(model + ".jsonl") as f:
        rows = Dataset.from_list([json.loads(line) for line in f])
    trainer = trl.DPOTrainer(model=load(), ref_model=ref, args=settings, peft_config=adapters, train_dataset=rows,
                             processing_class=AutoTokenizer.from_pretrained(model), callbacks=[Timer()])
    trainer.train()
    return {"pairs_per_s": batch / float(np.median(np.diff(times)[2:])), "peak_gib": train.peak_gib(DEVICES[0])}


def profile_run(model, *options):
    """{"shares": {operation: share of the time}}: the five largest costs of step 4."""
    profiler = torch.profiler.profile()
    clip = torch.nn.utils.clip_grad_norm_
    steps = []

    # train.py clips once a step, so the profile reaches from there to there
    def counted(*args):
        steps.append(1)
        if len(steps) == 3:
            profiler.start()
        if len(steps) == 4:
            profiler.stop()
        return clip(*args)
    torch.nn.utils.clip_grad_norm_ = counted
    bench_run(model, 5, *options)

    cost, events = "self_cpu_time_total", profiler.key_averages()
    if torch.cuda.is_available():
        # kernels only, or the operations that launch them would count once more
        kernels = torch.autograd.DeviceType.CUDA
        cost, events = "self_device_time_total", [x for x in events if x.device_type == kernels]
        events = [x for x in events if not x.is_user_annotation]

    # names of kernels can be very long
    costs = collections.Counter()
    for event in events:
        costs[event.key[:80]] += getattr(event, cost)
    total = sum(costs.values())
    return {"shares": {key: x / total for key, x in costs.most_common(5)}}


def gpu_tests():
    """The tests that take a GPU; one that is skipped is no success."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "test_gpu", os.path.join(HERE, "test_tdpo.py")]
    # it has to end before `apart` ends this process, which would leave pytest running
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS - 20)
    said = done.stdout.splitlines()[-1]
    if done.returncode or "passed" not in said or "skipped" in said:
        raise RuntimeError(done.stdout[-2000:])
    return {"said": said}


# -----------------------------------------------------------------------------
# the GPU's day

# what an H100 should reach: times TRL's speed, model FLOP utilization, TFLOP/s of the loss layer
GOALS = {"ratio": 3, "mfu": 0.5, "tflops": 500}


def day_items(models, vocabularies, steps, batch, N, d):
    """(name, function, its arguments) of all that is measured, in order."""
    for V in vocabularies:
        for form in ("products", "fused"):
            yield f"loss layer, {form}, V {V}", bench_loss, (form, N, V, d)
    size = f"--batch_size={batch}"
    for name in models:
        yield f"{name}, rank 0", bench_run, (name, steps, size, "--compile=True")
        if importlib.util.find_spec("trl"):
            yield f"{name}, rank 0, TRL", bench_trl, (name, steps, batch, 0)
        yield f"{name}, rank 16", bench_run, (name, steps, size, "--lora_rank=16")
        if importlib.util.find_spec("trl"):
            yield f"{name}, rank 16, TRL", bench_trl, (name, steps, batch, 16)
    # the last model in other ways
    checkpointed = "--checkpoint_activations=True"
    yield f"{name}, rank 0, not compiled", bench_run, (name, steps, size, "--compile=False")
    yield f"{name}, rank 0, checkpointed", bench_run, (name, steps, size, "--compile=True", checkpointed)
    yield "profile", profile_run, (name, size)


def gpu_day(folder, toy=False):
    """{item: what was measured}, also in folder/gpu.json; an item that fails says why, and the others go on."""
    if not toy and not torch.cuda.is_available():
        sys.exit(f"error: torch {torch.__version__} sees no GPU here, which is what the day is for")
    deadline = time.time() + 60 * MINUTES

    # toy sizes are for a test on a CPU
    models, vocabularies, steps, batch, N, d = GPU_MODELS, (50257, 128256, 151936), 12, 64, 8192, 1024
    if toy:
        models, vocabularies, steps, batch, N, d = TOY_MODELS, (2048,), 5, 8, 128, 32
    items = list(day_items(models, vocabularies, steps, batch, N, d))
    if not toy:
        items.insert(0, ("tests", gpu_tests, ()))

    os.makedirs(folder, exist_ok=True)
    with contextlib.chdir(folder):
        found = measured_before(folder)
        for name, config in models.items():
            if not os.path.exists(name + ".jsonl"):
                numbers_model(name, config, pairs=(steps + 1) * batch + 100)

        for name, measure, args in items:
            # done on an earlier start
            if name in found and "failed" not in found[name]:
                continue

            # an item that fails, or takes too long, does not keep the others from being measured
            began = time.time()
            try:
                if began > deadline:
                    raise TimeoutError(f"not reached in {MINUTES} minutes: start it again")
                found[name] = apart(measure, *args, seconds=min(SECONDS, deadline - began))
            except (RuntimeError, TimeoutError) as error:
                found[name] = {"failed": str(error)}
            found[name]["took"] = time.time() - began
            print(f"{name}: {found[name]}", flush=True)

            # written after each item, as the machine may be gone before the last
            compare_items(found, models, vocabularies)
            with open("gpu.json", "w") as f:
                json.dump(found, f, indent=1)
            with open("gpu.md", "w") as f:
                f.write("\n".join(gpu_table(found)) + "\n")
    return found


def measured_before(folder):
    """What an earlier start measured in this folder, or the first entry of a new day: its card and versions."""
    card = "cpu"
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
    device = {"card": card, "torch": torch.__version__, "transformers": hf.__version__}
    if not os.path.exists("gpu.json"):
        return {"device": device}
    with open("gpu.json") as f:
        found = json.load(f)
    if found["device"] != device:
        sys.exit(f"error: {folder} is of {found['device']}, this is {device}: name a different folder")
    return found


def compare_items(found, models, vocabularies):
    """Add to each item how it compares with the item it is measured against: a ratio, or the difference of losses."""
    # the fused loss beside its products
    for V in vocabularies:
        ours = found.get(f"loss layer, fused, V {V}", {})
        floor = found.get(f"loss layer, products, V {V}", {})
        if "tflops" in ours and "tflops" in floor:
            ours["of products"] = ours["tflops"] / floor["tflops"]

    for name in models:
        # train.py beside TRL
        for rank in (0, 16):
            ours = found.get(f"{name}, rank {rank}", {})
            theirs = found.get(f"{name}, rank {rank}, TRL", {})
            if "pairs_per_s" in ours and "pairs_per_s" in theirs:
                ours["ratio"] = ours["pairs_per_s"] / theirs["pairs_per_s"]

        # the same run in other ways, which must not change its losses
        compiled = found.get(f"{name}, rank 0", {})
        for way in ("not compiled", "checkpointed"):
            other = found.get(f"{name}, rank 0, {way}", {})
            if "losses" in compiled and "losses" in other:
                gaps = [abs(x / y - 1) for x, y in zip(compiled["losses"], other["losses"])]
                other["difference"] = max(gaps)


COLUMNS = {
    "pairs_per_s": "pairs/s", "ratio": "× TRL", "mfu": "MFU", "tflops": "TFLOP/s", "of products": "× products",
    "peak_gib": "peak GiB", "gib": "extra GiB", "difference": "losses differ by", "took": "s",
}


def gpu_table(found):
    """Lines of gpu.md: one for each item, with the goals that it misses."""
    yield ", ".join(found["device"].values()) + "\n"
    yield "| item | " + " | ".join(COLUMNS.values()) + " | |"
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for item, values in found.items():
        if item == "device" or "shares" in values:
            continue
        said = values.get("failed", values.get("said", ""))
        # the products alone and TRL have no goal of ours
        if not item.endswith("TRL") and "products" not in item:
            for name, goal in GOALS.items():
                if values.get(name, goal) < goal:
                    said += f" under the goal of {goal:g}"
        cells = []
        for name in COLUMNS:
            cell = ""
            if name in values:
                cell = f"{values[name]:.3g}"
            cells.append(cell)
        yield f"| {item} | " + " | ".join(cells) + " | " + said.replace("\n", " ").replace("|", "/") + " |"
    for cost, share in found.get("profile", {}).get("shares", {}).items():
        yield f"\n{share:.1%} of a step: {cost}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["gpu"]:
        gpu_day(*sys.argv[2:] or ["out/gpu"])
    else:
        bench_layer(*map(int, sys.argv[1:]))
