"""Preference-tune a causal language model with TDPO, TDPO2, DPO or f-DPO, or fine-tune it first (SFT). One flat loop.

    python train.py --method=tdpo2 --alpha=0.5                          # the embedded task: no download, no GPU, two minutes
    python train.py --method=dpo                                        # the same with plain DPO
    python train.py --data=imdb                                         # the paper's sentiment experiment (a GPU and the hub)
    python train.py --method=sft --data=hh --init_from=EleutherAI/pythia-2.8b --out_dir=out/hh-sft
    python train.py --method=tdpo2 --data=hh --init_from=out/hh-sft
    python train.py --data=pairs.jsonl --init_from=DIR                  # your own pairs: prompt, chosen, rejected
    python train.py --resume=True --out_dir=out/reviews-tdpo2           # continue a run

Paper: Token-level Direct Preference Optimization, Zeng et al., ICML 2024, arXiv:2404.11999. The loss is in tdpo.py.
"""
import argparse
import ctypes
import difflib
import fcntl
import functools
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

# -----------------------------------------------------------------------------
# the objective
method = "tdpo2"            # sft, dpo, fdpo, tdpo1 or tdpo2
alpha = 0.5                 # weight of the sequential KL in tdpo2, Eq. 17
beta = 0.1                  # strength of the tie to the reference; fdpo wants far less (0.03 on HH, 1e-5 on IMDb)
# data
data = "reviews"            # reviews (embedded), imdb, hh, or a .jsonl/.json/.parquet/.csv file or hub dataset with prompt, chosen, rejected
eval_data = ""              # held-out pairs in the same forms; default: a tenth of the prompts, or the test split of hh
eval_pairs = 512            # at most so many of them are evaluated
strict = False              # one bad row ends the run; otherwise up to 1 % are left out and counted
max_length = 512            # tokens of a prompt and one response
max_prompt_length = 256     # tokens a prompt is cut to where max_length is exceeded
truncation = "left"         # the side on which such a prompt loses tokens: left or right
# model
init_from = ""              # the policy's start: a directory or hub id; scratch is the embedded task's tiny GPT-2
ref_from = ""               # the reference; default: a frozen copy of init_from
# the sentiment task (reviews, imdb): how its pairs are made
texts = "stanfordnlp/imdb"  # reviews for imdb: a hub id, or a .parquet/.jsonl file with text and split (train, test)
reward = "siebert/sentiment-roberta-large-english"  # a text-classification model (directory or hub id), or exact, the embedded task's
train_prefixes = 4096       # beginnings of training reviews that are completed
eval_prefixes = 256         # beginnings of test reviews that are completed at every evaluation
completions = 4             # samples for each training prefix; every two make a pair
max_new_tokens = 64         # tokens of a completion
min_score_gap = 0.1         # pairs whose rewards differ by no more are dropped
# optimization (the paper's values)
max_steps = 0               # 0 is one pass over the pairs
batch_size = 64             # pairs a step
micro_tokens = 0            # tokens a forward pass; 0 is 8192 on cuda, 1024 elsewhere; changes no result; lower it when memory runs out
optimizer = "rmsprop"       # rmsprop or adamw
learning_rate = 5e-6        # constant after the warm-up
warmup_steps = 150          # linear
grad_clip = 10.0            # largest gradient norm; 0 turns clipping off
# the run
out_dir = ""                # becomes an ordinary Hugging Face directory; default: out/DATA-METHOD
resume = False              # continue the run in out_dir, with its options
overwrite = False           # replace the run in out_dir
eval_interval = 100         # steps between evaluations; 0 evaluates at the start and the end only
save_interval = 100         # steps between checkpoints, each evaluated first; 0 saves at the end only
log_interval = 1            # steps between printed lines; log.jsonl has every step
wandb_log = False           # log to Weights & Biases too
seed = 1                    # of the order of pairs, the split, samples and the scratch model
device = "auto"             # auto, cuda, mps or cpu
dtype = "auto"              # auto (bfloat16 on cuda, else float32), bfloat16 (autocast over fp32 weights) or float32
compile = "auto"            # torch.compile the model: auto (on cuda), True or False
# -----------------------------------------------------------------------------

METHODS = ("sft", "dpo", "fdpo", "tdpo1", "tdpo2")
TASKS = ("reviews", "imdb")
PRESETS = {     # what a task sets in place of the defaults above; an explicit option wins over either
    "reviews": dict(init_from="scratch", reward="exact", texts="", max_length=112, max_prompt_length=16, max_new_tokens=96, train_prefixes=256, micro_tokens=8192,
                    max_steps=250, learning_rate=1e-4, warmup_steps=20, eval_interval=50, save_interval=0, log_interval=10, device="cpu"),
    "reviews sft": dict(max_length=128, max_steps=300, optimizer="adamw", learning_rate=3e-3, grad_clip=1.0, eval_interval=100, log_interval=50),
    "imdb": dict(init_from="insub/gpt2-large-IMDb-fine-tuned", max_length=128, max_prompt_length=32),
    "imdb sft": dict(init_from="gpt2-large", learning_rate=1e-5),
}
CHANGEABLE = {"resume", "max_steps", "eval_interval", "save_interval", "log_interval", "wandb_log", "micro_tokens", "device", "compile", "out_dir"}


def configure(argv):
    """The run's options: the globals above, then the task's presets, then --key=value. All mistakes in one message, exit code 2."""
    knobs = dict(re.findall(r"^(\w+) = .*?  +# (.*)$", open(__file__, encoding="utf-8").read().split("# ---------")[1], re.M))
    defaults, wrong = {name: globals()[name] for name in knobs}, []
    presets = "\n".join(f"{name}: " + ", ".join(f"{k}={v}" for k, v in values.items()) for name, values in PRESETS.items())
    parser = argparse.ArgumentParser(usage="python train.py [--key=value ...]", description=__doc__, allow_abbrev=False, exit_on_error=False,
                                     epilog="in place of these defaults, by --data and --method:\n" + presets, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, comment in knobs.items():
        flag = dict(nargs="?", const="True") if isinstance(defaults[name], bool) else {}
        parser.add_argument("--" + name, metavar="", help=f"{comment} [{defaults[name]}]".replace("%", "%%"), **flag)
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        args, unknown, wrong = argparse.Namespace(), [], [f"{error.argument_name}: {error.message}"]
    near = lambda word, names, cutoff=0.6: "".join(f"; did you mean {x}?" for x in difflib.get_close_matches(word, names, 1, cutoff))
    wrong += [f"unknown option {word}{near(word.split('=')[0], ['--' + x for x in knobs], 0)} (--help lists them all, written --key=value)" for word in unknown]
    given = {}
    for name, text in vars(args).items():
        kind = type(defaults[name])
        try:
            if text is not None and text.encode() is not None:          # half a surrogate pair cannot be encoded, a ValueError
                given[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
                if kind is float and not math.isfinite(given[name]):
                    raise ValueError
        except (ValueError, KeyError):
            wrong.append(f"--{name}={text}: expected {'True or False' if kind is bool else 'a whole number' if kind is int else 'a number' if kind is float else 'UTF-8 text'}")
            given.pop(name, None)

    # presets, and the options of a run to be resumed
    c = argparse.Namespace(**{**defaults, **given})
    preset = {**PRESETS.get(c.data, {}), **(PRESETS.get(f"{c.data} sft", {}) if c.method == "sft" else {})}
    folder = os.path.normpath(c.out_dir or f"out/{os.path.splitext(os.path.basename(c.data))[0]}-{c.method}")
    if c.resume:
        try:
            preset = {**json.load(open(os.path.join(folder, "options.json"), encoding="utf-8")), "resume": True, "overwrite": False}
            wrong += [f"--resume=True: {folder}/options.json is another version's: it says {name}={preset.pop(name, 'nothing')}; start again with --overwrite=True"
                      for name in {**preset, **defaults} if type(preset.get(name)) is not type(defaults.get(name))]
        except (OSError, ValueError, TypeError, AttributeError):
            wrong.append(f"--resume=True: {folder} holds no run, or its options.json cannot be read; name the --out_dir of a run")
        wrong += [f"--{name}={value} would change the run in {folder}, which has {preset[name]}; leave it out, or start another --out_dir"
                  for name, value in given.items() if name in preset and value != preset[name] and name not in CHANGEABLE]
    c = argparse.Namespace(**{name: {**defaults, **preset, **given}[name] for name in knobs})
    c.out_dir = folder

    # the values one by one
    for name, allowed in dict(method=METHODS, truncation=("left", "right"), optimizer=("rmsprop", "adamw"), dtype=("auto", "bfloat16", "float32"),
                              compile=("auto", "True", "False"), device=("auto", "cuda", "mps", "cpu")).items():
        if getattr(c, name) not in allowed:
            wrong.append(f"--{name}={getattr(c, name)}: it is one of {', '.join(allowed)}{near(getattr(c, name), allowed)}")
    for name, least in dict(alpha=0, min_score_gap=0, micro_tokens=0, max_steps=0, warmup_steps=0, grad_clip=0, eval_interval=0, save_interval=0, seed=0, log_interval=1,
                            eval_pairs=1, batch_size=1, max_prompt_length=1, train_prefixes=1, max_new_tokens=1, eval_prefixes=2,
                            completions=2, max_length=2).items():
        if not least <= getattr(c, name) < 2**63:
            wrong.append(f"--{name}={getattr(c, name)}: it must be at least {least}, and less than 2^63")
    wrong += [f"--{name}={getattr(c, name)}: it must be greater than 0" for name in ("beta", "learning_rate") if getattr(c, name) <= 0]
    wrong += [f"--max_prompt_length={c.max_prompt_length} leaves no room for a response within --max_length={c.max_length}"] * (c.max_prompt_length >= c.max_length)
    for name, known in (("data", (*TASKS, "hh")), ("eval_data", ("", "hh"))):
        source, is_file = getattr(c, name), getattr(c, name).endswith((".jsonl", ".json", ".parquet", ".csv"))
        if source not in known and not (os.path.isfile(source) if is_file else re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not os.path.exists(source)):
            wrong.append(f"--{name}={source}: {'no such file' if is_file else 'unknown data'}; it is {', '.join(filter(None, known))}, a .jsonl, .json, "
                         f".parquet or .csv file, or a hub id (owner/name){near(source, known)}")

    # what belongs together
    task, sft = c.data in TASKS, c.method == "sft"
    for names, used, by in (("alpha", c.method == "tdpo2", "--method=tdpo2"), ("beta ref_from", not sft, "preference methods"),
                            ("texts", c.data == "imdb", "--data=imdb"), ("max_prompt_length truncation", not (task and sft), "pairs, not by whole texts"),
                            ("reward train_prefixes eval_prefixes completions max_new_tokens min_score_gap", task and not sft,
                             "preference methods on reviews and imdb"), ("strict eval_data", not task or c.eval_data, "pairs from files and the hub")):
        wrong += [f"--{name} would be ignored: it is used by {by}" for name in names.split() if name in given and not used]
    for name in ("init_from", "ref_from", "reward", "texts"):
        path = getattr(c, name)         # a directory, a file, or owner/name on the hub; what looks like a path has to be there
        if path and not os.path.exists(path) and not re.fullmatch(r"(?!out/)\w[\w.-]*(/[\w.-]+)?(?<!\.parquet)(?<!\.jsonl)", path):
            wrong.append(f"--{name}={path}: no such file or directory")
    wrong += [f"--data={c.data} needs a model: --init_from=DIRECTORY or a hub id"] * (not c.init_from)
    wrong += ["scratch is the tiny untrained model of --data=reviews and knows its words alone; name a directory or a hub id"] * (
        c.init_from == "scratch" and c.data != "reviews" or c.ref_from == "scratch")
    wrong += ["--wandb_log=True: wandb is not installed; pip install wandb, or leave it out"] * (c.wandb_log and not importlib.util.find_spec("wandb"))
    if os.path.isdir(folder) and any(os.path.exists(x) and os.path.samefile(x, folder) for x in (c.init_from, c.ref_from)):
        wrong.append(f"--out_dir={folder} is a model that the run starts from; name another")
    elif not (c.resume or c.overwrite) and any(os.path.exists(os.path.join(folder, f)) for f in ("options.json", "log.jsonl", "config.json")):
        wrong.append(f"--out_dir={folder} holds another run: --resume=True continues it, --overwrite=True replaces it, another --out_dir keeps it")
    wrong += ["--resume=True and --overwrite=True contradict each other"] * (c.resume and c.overwrite)
    if wrong and os.environ.get("RANK", "0") == "0":        # of many processes the first speaks for all, and is the one that has the files
        print("error: " + "\nerror: ".join(wrong), file=sys.stderr)
        sys.exit(2)
    return vars(c)


if __name__ == "__main__":      # before the imports below, so that a typing mistake costs no time
    os.environ.get("WORLD_SIZE") or os.environ.pop("RANK", None)        # torchrun sets both
    options = configure(sys.argv[1:])
    if os.environ.get("RANK", "0") == "0":
        try:                    # one run a directory: the lock lasts as long as this process, however it ends
            os.makedirs(options["out_dir"], exist_ok=True)
            fcntl.flock(lock := open(os.path.join(options["out_dir"], ".lock"), "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            sys.exit(f"error: --out_dir={options['out_dir']}: " + ("another run is at work in it; name another directory, or wait" if isinstance(error, BlockingIOError)
                     else f"{error.strerror}; name a directory that can be written"))
        options = configure(sys.argv[1:])       # again, as a run may have come and gone before the lock was ours
    globals().update(options)

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # torch on a CPU asks for huge pages: its large buffers are new in every pass
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")     # of its kernels for each length of a row and a pair, 1024 would fill memory bit by bit
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import register_fsdp_forward_method
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import eval_imdb
from sample import (DEVICES, autocast, best_row, choose_attention, collate, fingerprint, from_rank_0, join_processes, load_model, load_reference, load_state, output_weight, pack,
                    response_states, save, shard, size, total)
from tdpo import fused_sft_loss, fused_tdpo_loss, margin


# -----------------------------------------------------------------------------
# steps, metrics


@functools.lru_cache(2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def step_indices(step, batch_size, n, seed):
    """The pairs of a step: the next batch_size of an endless stream of permutations of n, each from (seed, epoch)."""
    return [int(permutation(n, seed, k // n)[k % n]) for k in range(step * batch_size, (step + 1) * batch_size)]


def preference_metrics(stats, method, beta, alpha):
    """What the log holds means of, a dict of (P,) tensors; stats as from tdpo_loss. acc compares log-ratios, the same for every method;
    acc_loss is the method's own, margin > 0; the gaps are absolute differences."""
    s = stats
    m = margin(method, s["logratio_w"], s["logratio_l"], s["kl_w"], s["kl_l"], beta, alpha)
    return {"loss": s["loss"], "acc": s["logratio_w"] > s["logratio_l"], "acc_loss": m > 0, "margin": m, **{name: s[name] for name in s if name != "loss"},
            "kl_gap": (s["kl_l"] - s["kl_w"]).abs(), "rkl_gap": (s["rkl_l"] - s["rkl_w"]).abs()}


def peak_gib(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource                 # ru_maxrss is in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


if __name__ == "__main__":
    # -------------------------------------------------------------------------
    # processes and device
    started, signals, (rank, world) = time.time(), [], join_processes(out_dir)
    for number in (signal.SIGINT, signal.SIGTERM):      # until there is something to save; rank 0 ends its SFT run too
        signal.signal(number, signal.SIG_DFL if rank else lambda n, _: sys.exit(128 + n))
    globals().update(from_rank_0(options))              # which reads, prints and writes for all
    sft, task = method == "sft", data in TASKS
    device = DEVICES[0] if device == "auto" else device
    if device not in DEVICES:
        sys.exit(f"error: --device={device}: torch {torch.__version__} sees no such device here; --device=cpu works everywhere")
    dtype = options["dtype"] = ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype
    compile = compile == "True" or compile == "auto" and device == "cuda"
    torch.manual_seed(seed)

    # -------------------------------------------------------------------------
    # policy, reference, data
    found = ref = score = state = None
    if rank == 0:
        if init_from == "scratch" and not sft:      # the embedded task trains its SFT model first, with this same file
            init_from = options["init_from"] = os.path.join(os.path.dirname(out_dir), f"reviews-sft-{seed}")
            if not os.path.exists(os.path.join(init_from, "config.json")):
                command = ["--method=sft", f"--out_dir={init_from}-new", f"--seed={seed}", f"--device={device}", f"--dtype={dtype}", "--overwrite=True"]
                print("the SFT model first: python train.py " + " ".join(command), flush=True)
                if subprocess.run([sys.executable, __file__, *command], start_new_session=True, env={**os.environ, "RANK": "0", "WORLD_SIZE": "1"}).returncode:
                    sys.exit("error: the SFT run failed")
                os.rename(f"{init_from}-new", init_from)        # a model that was trained to its end
        place = device if world == 1 or task else "cpu"         # one GPU may be too small for the whole model
        model, tokenizer = eval_imdb.scratch_model(seed) if init_from == "scratch" else load_model(init_from, place)
        model.to(place)
        if not sft:
            ref = load_reference(ref_from or init_from, model, tokenizer)
            score = eval_imdb.load_reward(reward, device) if task else None
        examples, held_out, *others = eval_imdb.training_data(options, model, tokenizer, score, dtype)
        longest, step = max(examples + held_out, key=lambda e: len(e[0]) + max(len(e[1]), len(e[2]))), 0
        attention = choose_attention([(init_from, model)] + ([] if sft else [(ref_from or "the reference", ref)]), [examples[0], longest],
                                     "flex" if place == "cuda" else "dense" if compile and device != "cuda" else "pairs")
        attention, digest = "flex" if device == "cuda" and attention == "pairs" else attention, fingerprint(examples + held_out, ref)
        if resume:
            state = load_state(out_dir, model)
            if state["data"] != digest:
                sys.exit(f"error: the data or the reference of the run in {out_dir} is another now; give back what it was, or start another --out_dir")
            step = state["step"]
        found = examples, held_out, *others, attention, digest, [model.config, (ref or model).config], tokenizer, init_from, step
    examples, held_out, names, prefixes, truncated, dropped, attention, digest, configs, tokenizer, init_from, step = from_rank_0(found)
    if rank:
        with torch.device("meta"):
            model, ref = (AutoModelForCausalLM.from_config(c, dtype=torch.float32, attn_implementation="pair_attention").eval() for c in configs)
    models = [model] if sft else [model, ref.requires_grad_(False)]
    n_params, (vocabulary, width) = sum(p.numel() for p in model.parameters()), model.get_output_embeddings().weight.shape
    n_body = n_params - vocabulary * width * (1 if model.get_output_embeddings().weight is model.get_input_embeddings().weight else 2)
    if device == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc would return freed buffers, to ask for fresh pages at the next step, which takes a third of the embedded task's time
        libc.mallopt(-1, 2**31 - 1) and libc.mallopt(-3, 1 << 27)
    for m in models:            # states: the hidden states of a row; one call of it gathers what FSDP has spread
        if world > 1:
            shard(m, device, compile)
        m.states = functools.partial(response_states, torch.compile(m.base_model, dynamic=False) if compile and world == 1 else m.base_model, m)
        register_fsdp_forward_method(m, "states")

    # -------------------------------------------------------------------------
    # rows and optimizer
    sizes = list(map(size, examples))
    micro_tokens = max(micro_tokens or (8192 if device == "cuda" else 1024), *sizes, *map(size, held_out))
    if attention != "pairs" or world > 1:
        micro_tokens = best_row([[sizes[i] for i in step_indices(k, batch_size, len(sizes), seed)] for k in range(16)], max(*sizes, *map(size, held_out)), micro_tokens,
                                world, attention == "dense")
    row_length = micro_tokens if attention != "pairs" else 0            # rows of one length, so that the model compiles once
    optimizers = {"rmsprop": torch.optim.RMSprop, "adamw": functools.partial(torch.optim.AdamW, weight_decay=0.0)}
    optimizer = optimizers[optimizer](model.parameters(), lr=learning_rate)
    if resume:
        set_optimizer_state_dict(model, optimizer, state["optimizer"] if state else {}, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=world > 1))
    max_steps = max_steps or -(-len(examples) // batch_size)
    if step >= max_steps:
        sys.exit(f"error: {out_dir} is at step {step} already; --max_steps={step + max(1, step)} would continue it")

    # -------------------------------------------------------------------------
    # what will happen
    peaks = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12}        # dense bf16 FLOP/s, NVIDIA's data sheets
    peak = next((x * world for name, x in peaks.items() if device == "cuda" and name in torch.cuda.get_device_name()), None)
    tokens, saved, noun = sum(sizes), 0 if sft else sum(len(e[0]) for e in examples), "texts" if sft else "pairs"
    print(f"{noun}: {len(examples)} to train on, {len(held_out)} held out; {truncated} truncated, {dropped} dropped\n"
          f"rows: {f'of {row_length} tokens' if row_length else f'of up to {micro_tokens} tokens, without padding'}; shared prompts "
          f"save {saved} of {tokens + saved} tokens; attention {attention}\n"
          f"step: {batch_size} {noun}, about {batch_size * tokens // len(examples)} tokens; {max_steps} steps, {max_steps * batch_size / len(examples):.1f} epochs\n"
          f"policy: {init_from}, {n_params / 1e6:.1f}M parameters, vocabulary {vocabulary}; reference: {'none' if sft else ref_from or 'a frozen copy'}\n"
          f"run: {method}{f', alpha {alpha}' if method == 'tdpo2' else ''}{'' if sft else f', beta {beta}'}, seed {seed}, device {device}"
          f"{f', {world} processes' if world > 1 else ''}, dtype {dtype}, compile {compile}{' (slow first steps)' if compile else ''}, torch {torch.__version__}; "
          f"into {out_dir}", flush=True)
    if model.dtype != torch.float32 and learning_rate < torch.finfo(model.dtype).eps / 2 * max(p.abs().mean().item() for p in model.parameters()):
        print(f"warning: weights in {model.dtype} round updates of {learning_rate} away; keep them in float32")
    log = eval_imdb.start_log(out_dir, options, step, resume) if rank == 0 else open(os.devnull, "w")
    if wandb_log and rank == 0:
        import wandb
        wandb.init(project="tdpo", name=os.path.basename(out_dir), config=options, dir=out_dir)

    # -------------------------------------------------------------------------
    # one pass over a row, for training and for evaluation
    def passes(indices, examples):
        """This process's rows of a step: (indices of its pairs, tensors on the device, whether they count). Processes have equally many, as they
        have to meet in every pass: who would have fewer repeats a row, uncounted."""
        rows = pack([size(examples[i]) for i in indices], micro_tokens)
        for k in range(rank, -(-len(rows) // world) * world, world):
            row = [indices[i] for i in rows[min(k, len(rows) - 1)]]
            yield row, collate(examples, row, row_length, device, attention), k < len(rows)

    def forward(batch, counts):
        """The loss, a mean over the pass's pairs (sft: tokens), and stats, a value a pair."""
        with autocast(device, dtype):
            hidden = model.states(batch)
            if sft:
                loss, stats = fused_sft_loss(hidden, output_weight(model), batch["labels"])
            else:
                with torch.no_grad():
                    ref_hidden = ref.states(batch)
                loss, stats = fused_tdpo_loss(hidden, output_weight(model), ref_hidden, output_weight(ref), *(batch[x] for x in ("labels", "pair", "chosen")),
                                              beta, alpha, method)
        return loss * len(stats["loss"]) * counts, {name: x[:len(x) * counts] for name, x in stats.items()}

    def means(stats, n):
        """Metrics over n pairs, of which this process has some, in several passes."""
        stats = {name: torch.cat([s[name] for s in stats]) for name in stats[0]}
        columns = {"loss": stats["loss"]} if sft else preference_metrics(stats, method, beta, alpha)
        sums = torch.stack([x.float().sum() for x in columns.values()])
        return dict(zip(columns, total(sums) / n))

    def write(record, columns):
        """One JSON line in the log, and the columns that a person watches on the screen."""
        log.write(json.dumps(record) + "\n")
        if wandb_log and rank == 0:
            wandb.log(record, step=record["step"])
        if columns:
            print(f"{'step' if 'loss' in record else 'eval'} {record['step']:>{len(str(max_steps))}} | " + " | ".join(
                f"{x.removeprefix('eval_')} {record[x]:>8.4g}" for x in columns if x in record), flush=True)

    def evaluate(whole=True):
        """All that is held out, for the log; or one example, where a signal asks to save at once, to see that the weights are sound."""
        n = len(held_out) if whole else 1
        with torch.no_grad():
            batches = tqdm(passes(range(n), held_out), desc="evaluating", leave=False, disable=None)
            found = means([forward(batch, counts)[1] for _, batch, counts in batches], sum(len(e[1]) for e in held_out[:n]) if sft else n)
        found = {name: x.item() for name, x in found.items()}
        if not math.isfinite(found["loss"]):
            sys.exit(f"error: the held-out loss after step {step} is {found['loss']}, so this step is not saved. Lower --learning_rate")
        if not whole:
            return
        if step == 0 and not sft and found["kl_l"] > 1e-5:
            print(f"warning: before the first step the KL from {ref_from or 'the reference'} is {found['kl_l']:.2g} nats, not 0: its weights differ, or their dtype")
        if task and not sft:
            with torch.compiler.set_stance("force_eager"):      # prompts of every length would use up the recompilations
                found.update(eval_imdb.score_policy(model, ref, tokenizer, prefixes, score or (lambda texts: [0.0] * len(texts)), max_new_tokens, seed, dtype))
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)       # glibc: the pieces that sampling leaves would add up
        write({"step": step, **{"eval_" + name: x for name, x in found.items()}, "eval_pairs": n},
              ["eval_" + x for x in ("loss", "acc", "margin", "kl_w", "kl_l", "kl_gap", "reward", "reward_se", "sample_kl", "sample_rkl", "entropy")])

    # -------------------------------------------------------------------------
    # the loop
    speeds = []
    if not resume:
        evaluate()
    for number in (signal.SIGINT, signal.SIGTERM):      # the first lets the step finish and saves, a second one leaves at once; torchrun adds a SIGTERM to Ctrl-C
        signal.signal(number, lambda n, _: (signals.append(n), [signal.signal(x, signal.SIG_DFL) for x in ([n] if world > 1 else [signal.SIGINT, signal.SIGTERM])]))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()        # of the steps and later evaluations, not of what prepared them
    upcoming = list(passes(step_indices(step, batch_size, len(examples), seed), examples))
    while step < max_steps:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / max(1, warmup_steps))
        indices = step_indices(step, batch_size, len(examples), seed)
        count = sum(len(examples[i][1]) for i in indices) if sft else batch_size
        optimizer.zero_grad(set_to_none=device != "cpu")          # gradients that stay where they are keep glibc's heap from growing at every step
        stats, members = [], []
        while upcoming:
            some, batch, counts = upcoming.pop(0)                   # so that each pass's masks go with it
            loss, s = forward(batch, counts)
            (loss * (world / count)).backward()     # the step's loss is one mean, however its pairs are packed; FSDP takes the mean over processes
            stats.append(s)
            members += some[:len(some) * counts]
        upcoming = list(passes(step_indices(step + 1, batch_size, len(examples), seed), examples))      # packed while the device still works
        found = means(stats, count)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        found["grad_norm"] = norm.full_tensor() if world > 1 else norm
        found["stop"] = total(torch.full((), float(len(signals)), device=device))       # processes may hear of a signal in different steps
        found = dict(zip(found, torch.stack(list(found.values())).tolist()))        # the step's one wait for the device
        if not (math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])):
            bad = [] if sft else [m for m, x in zip(members, torch.cat([s["loss"] for s in stats]).tolist()) if not math.isfinite(x)]
            if world > 1:
                dist.all_gather_object(everywhere := [None] * world, bad)
                bad = sum(everywhere, [])
            sys.exit(f"error: the loss ({found['loss']}) or gradient norm ({found['grad_norm']}) of step {step + 1} is not finite; {noun}{'' if bad else ' of the step'}: "
                     f"{', '.join(names[i] for i in (bad or indices)[:8])}. Nothing was saved since the last checkpoint: lower --learning_rate, or look at these {noun}")
        optimizer.step()
        step, stop = step + 1, found.pop("stop")
        seconds = time.perf_counter() - began
        n_tokens = sum(size(examples[i]) for i in indices)
        n_loss = sum(len(part) for i in indices for part in examples[i][1:])
        flops = (6 if sft else 8) * (n_tokens * n_body + n_loss * vocabulary * width)    # policy forward and backward, reference forward
        record = dict(step=step, epoch=step * batch_size / len(examples), **found, lr=optimizer.param_groups[0]["lr"], pairs_per_s=batch_size / seconds,
                      tokens_per_s=n_tokens / seconds, **({"mfu": flops / seconds / peak} if peak else {}), peak_gib=peak_gib(device))
        speeds.append([record[x] for x in ("pairs_per_s", "tokens_per_s", "mfu") if x in record])
        write(record, () if step % log_interval and step < max_steps else ("loss", "acc", "margin", "kl_w", "kl_l", "kl_gap", "grad_norm", "pairs_per_s", "mfu"))
        due_eval, due_save = (step == max_steps or interval and step % interval == 0 for interval in (eval_interval, save_interval))
        if due_eval or due_save or stop:                # what is saved has been evaluated, so no broken weights replace good ones
            evaluate(due_eval or due_save)
        if due_save or stop:
            save(out_dir, model, tokenizer, optimizer, step, digest)
        if stop and step < max_steps:
            print(f"stopped after step {step}, which is saved | continue: python train.py --resume=True --out_dir={out_dir}", flush=True)
            sys.exit(128 + (signals or [signal.SIGTERM])[0])

    middle = np.median(speeds[min(3, len(speeds) - 1):], axis=0)                    # the first steps warm up
    print(f"median speed {middle[0]:.2f} {noun}/s, {middle[1]:.0f} tokens/s{f', MFU {middle[2]:.1%}' if peak else ''}; "
          f"peak memory {peak_gib(device):.2f} GiB; {time.time() - started:.0f} s in all")
    if world > 1:
        dist.destroy_process_group()
    print(f"saved {out_dir} | next: python " + (f"train.py --method=tdpo2 --data={data} --init_from=" if sft and not task else "sample.py --model=") + out_dir)
