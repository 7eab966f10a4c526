"""Preference-tune a causal language model with TDPO, TDPO2, DPO or f-DPO, or fine-tune it first (SFT). One flat loop.

    python train.py --method=tdpo2 --alpha=0.5                          # the embedded task: no download, no GPU
    python train.py --data=imdb                                         # the paper's sentiment experiment (GPU, hub)
    python train.py --method=sft --data=hh --init_from=EleutherAI/pythia-2.8b --out_dir=out/hh-sft
    python train.py --method=tdpo2 --data=hh --init_from=out/hh-sft
    python train.py --data=pairs.jsonl --init_from=DIR                  # your own pairs: prompt, chosen, rejected
    python train.py --resume=True --out_dir=out/reviews-tdpo2           # continue a run

Paper: Token-level Direct Preference Optimization, Zeng et al., ICML 2024, arXiv:2404.11999. The loss is in tdpo.py.
"""
# Memory on a CPU has to be set up before torch is loaded. Large buffers get huge pages. The two caches of matrix
# kernels (oneDNN's and torch's own) are small, because every row length compiles kernels of its own. glibc keeps the
# buffers that are freed, because fresh pages at every step would cost a third of the embedded task's time. Only buffers
# of 16 MiB and more, such as logits, go back to the system: smaller ones would be put into the holes that they leave,
# break these up, and the heap would grow.
import ctypes
import os
import sys
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)        # M_TRIM_THRESHOLD
    ctypes.CDLL(None).mallopt(-3, 2**24)            # M_MMAP_THRESHOLD
if sys.platform == "win32":
    sys.exit("error: train.py runs on Linux and macOS; on Windows use WSL")

import argparse
import atexit
import collections
import contextlib
import copy
import csv
import datetime
import fcntl
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import re
import resource
import shlex
import shutil
import signal
import subprocess
import textwrap
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_state_dict, set_model_state_dict,
                                                     set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D
from transformers.utils import chat_template_utils

import eval_imdb
from sample import (DEVICES, chat, check_columns, check_printed, encode_prompt, encode_prompts, load_model,
                    load_reference, opening, parse, parse_json, positions_of, read_message, read_tools, reason_of,
                    rope_border, stop_tokens, with_system, write_lines)
from tdpo import CHUNK_BYTES, fused_tdpo_loss

# knobs: every assignment from here to the end of the knobs is an option; the comment after it is its help -------------
# the objective: a new knob is also an argument of margin or preference_loss in tdpo.py, and of the call in `forward`
method = "tdpo2"            # sft, dpo, fdpo, tdpo1 or tdpo2
alpha = 0.5                 # weight of the sequential KL in tdpo2, Eq. 17
beta = 0.1                  # how strongly the reference holds the policy; fdpo needs less (0.03 on HH, 1e-5 on IMDb)
# data
data = "reviews"            # reviews (embedded), imdb, hh, .jsonl/.json/.csv/.parquet files, a directory, a hub dataset
data_split = ""             # split of a directory or hub dataset; default: train
data_config = ""            # configuration of a directory or hub dataset that has several
eval_data = ""              # held-out pairs in the same forms; default: a tenth of the prompts, or hh's test split
eval_split = ""             # held-out split of eval_data, or of data if there is no eval_data
eval_pairs = 512            # largest number of held-out pairs that are evaluated
bad_rows = 0.01             # largest share of rows that may be left out as unusable; 0 allows none
show_data = 0               # print this many rows as the model will see them, and exit
max_length = 512            # tokens of a prompt and one response
max_prompt_length = 256     # if max_length is exceeded, a prompt keeps its last tokens, up to this many
# model
init_from = ""              # start of the policy: a directory or hub id; scratch is the embedded task's tiny GPT-2
ref_from = ""               # reference; default: a frozen copy of init_from
lora_rank = 0               # rank of adapters on the blocks' linear layers, at 10 times the rate; 0 trains all weights
checkpoint_activations = False  # compute each block's activations twice instead of keeping them; changes no result
# the sentiment task (reviews, imdb): how its pairs are made
texts = "stanfordnlp/imdb"  # reviews for imdb: a hub id, or a .parquet/.jsonl file with text and split (train, test)
reward = "siebert/sentiment-roberta-large-english"  # a text-classification model, or exact, the embedded task's reward
train_prefixes = 4096       # beginnings of training reviews that are completed
eval_prefixes = 256         # beginnings of test reviews that are completed at every evaluation
completions = 4             # samples for each training prefix; every two of them make a pair
max_new_tokens = 64         # longest completion, and longest answer in the samples that a run shows at its end
min_score_gap = 0.1         # pairs are dropped if their rewards differ by no more than this
# optimization (the paper's values)
epochs = 1.0                # passes over the pairs
max_steps = 0               # steps, instead of epochs
batch_size = 64             # pairs in a step
micro_tokens = 0            # tokens in a forward pass; 0: 8192 on cuda, 1024 elsewhere; changes memory, but no result
optimizer = "rmsprop"       # rmsprop or adamw
learning_rate = 5e-6        # after the warm-up
warmup_steps = 150          # steps of linear warm-up
lr_decay = "constant"       # after the warm-up: constant, or linear or cosine to 0 at the last step
grad_clip = 10.0            # largest gradient norm; 0 turns clipping off
# the run
out_dir = ""                # becomes an ordinary Hugging Face directory; default: out/DATA-METHOD
resume = False              # continue the run in out_dir with its options
overwrite = False           # replace the run in out_dir
eval_interval = 100         # steps between evaluations; 0 evaluates only at the start and the end
save_interval = 100         # steps between checkpoints, each of them evaluated first; 0 saves only at the end
log_interval = 1            # steps between printed lines; log.jsonl has every step
wandb_log = False           # log to Weights & Biases too
seed = 1                    # seed of the order of pairs, the held-out split, samples and the scratch model
device = "auto"             # auto, or a device that this machine has: cuda, mps, cpu
dtype = "auto"              # auto (bfloat16 if the GPU has it), bfloat16 (autocast over fp32 weights) or float32
compile = True              # torch.compile the model, on GPUs that compute in bfloat16
# end of the knobs -----------------------------------------------------------------------------------------------------

CHOICES = {
    "method": ("sft", "dpo", "fdpo", "tdpo1", "tdpo2"),
    "optimizer": ("rmsprop", "adamw"),
    "lr_decay": ("constant", "linear", "cosine"),
    "device": ("auto", *DEVICES),
    "dtype": ("auto", "bfloat16", "float32"),
}
# the smallest value of a number; beta, learning_rate and epochs must be positive
LEAST = dict(alpha=0, eval_pairs=1, bad_rows=0, show_data=0, max_length=2, max_prompt_length=1, lora_rank=0,
             train_prefixes=2, eval_prefixes=2, completions=2, max_new_tokens=1, min_score_gap=0, max_steps=0,
             batch_size=1, micro_tokens=0, warmup_steps=0, grad_clip=0, eval_interval=0, save_interval=0,
             log_interval=1, seed=0)
# the defaults of a task, where they differ from the values above; an option on the command line wins over both
PRESETS = {
    "reviews": {
        "init_from": "scratch", "reward": "exact", "texts": "", "device": "cpu",
        "max_length": 112, "max_prompt_length": 16, "max_new_tokens": 96, "train_prefixes": 256, "micro_tokens": 8192,
        "max_steps": 120, "learning_rate": 1e-4, "warmup_steps": 20,
        "eval_interval": 40, "save_interval": 0, "log_interval": 10,
    },
    "reviews sft": {
        "max_length": 128, "max_steps": 200, "optimizer": "adamw", "learning_rate": 3e-3, "grad_clip": 1.0,
        "eval_interval": 100, "log_interval": 50,
    },
    "imdb": {"init_from": "insub/gpt2-large-IMDb-fine-tuned", "max_length": 128, "max_prompt_length": 32},
    "imdb sft": {"init_from": "gpt2-large", "learning_rate": 1e-5},
}
# where files and models lie
PLACES = ("data", "eval_data", "init_from", "ref_from", "texts", "reward")
# a resumed run may change these; data and models may have moved, but their content has to be the same
CHANGEABLE = (*PLACES, "resume", "overwrite", "max_steps", "eval_interval", "save_interval", "log_interval",
              "wandb_log", "micro_tokens", "checkpoint_activations", "device", "compile", "out_dir")


def read_knobs():
    """{name: (section, help)} of every option: the assignments between the two marker lines above, the comment above a
    group of them and the comment after each."""
    with open(__file__, encoding="utf-8") as f:
        lines = f.read().splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("# knobs:"))
    end = next(n for n, line in enumerate(lines) if line.startswith("# end of the knobs"))
    knobs, section = {}, "options"
    for n in range(begin + 1, end):
        if lines[n].startswith("#"):
            section = lines[n].strip("# ").split(":")[0]
        if not lines[n].split("#")[0].strip():
            continue
        # gamma = 0.5  # its help
        found = re.fullmatch(r"""(\w+)(?:\s*:\s*\w+)?\s*=\s*("[^"]*"|'[^']*'|[^#"'=]+)\s*(?:#(.*))?""", lines[n])
        if not found:
            sys.exit(f"error: {__file__}, line {n + 1}: write one knob a line, as in gamma = 0.5  # its help")
        knobs[found[1]] = section, (found[3] or "").strip()
    return knobs


def true_or_false(text):
    """The value of a boolean option; argparse refuses other texts, because they are none of its choices."""
    return {"True": True, "False": False}.get(text, text)


def knob_values():
    """{name: value} of every option as it stands now, to be written and compared."""
    return {name: globals()[name] for name in read_knobs()}


def default_out_dir(data, method):
    """out/pairs-tdpo2 of some/pairs.jsonl.gz, and out/shards-tdpo2 of shards/*.jsonl and of shards/."""
    parts = os.path.abspath(data).split(os.sep)
    parts = [part for part in parts if not re.search(r"[*?\[]", part)]
    stem = re.sub(r"\.(jsonl|json|csv|parquet)(\.gz)?$", "", parts[-1]) or "data"
    return f"out/{stem}-{method}"


def configure(argv):
    """The values of all knobs: the globals above, then the task's presets, then --key=value; a resumed run's own
    values. A mistake ends the program with one sentence and exit code 2."""
    knobs = read_knobs()
    defaults = knob_values()
    presets = ""
    for name, preset in PRESETS.items():
        text = f"{name}: " + ", ".join(f"{key}={value}" for key, value in preset.items() if value != "")
        presets += textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="    ") + "\n"
    parser = argparse.ArgumentParser(usage="python train.py [--key=value ...]", description=__doc__, allow_abbrev=False,
                                     epilog=f"These defaults differ by --data and --method:\n{presets}",
                                     formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter,
                                                                       max_help_position=28))
    sections = {}
    for name, (section, comment) in knobs.items():
        if section not in sections:
            sections[section] = parser.add_argument_group(section)
        kind, choices = type(defaults[name]), CHOICES.get(name)
        if kind is bool:
            kind, choices = true_or_false, (True, False)
        help_text = f"{comment} [{defaults[name]}]".removesuffix(" []").replace("%", "%%")
        sections[section].add_argument("--" + name, type=kind, choices=choices, metavar="", default=argparse.SUPPRESS,
                                       help=help_text)
    given = vars(parse(parser, argv))

    # instead of the defaults: the presets of the task, or the options of the run that is resumed
    c = argparse.Namespace(**{**defaults, **given})
    folder = os.path.expanduser(os.path.normpath(c.out_dir or default_out_dir(c.data, c.method)))
    base = dict(PRESETS.get(c.data, {}))
    if c.method == "sft":
        base.update(PRESETS.get(c.data + " sft", {}))
    # adapters want about ten times the rate (Schulman et al., LoRA Without Regret, 2025)
    if c.lora_rank:
        base["learning_rate"] = 10 * base.get("learning_rate", c.learning_rate)
    changed = []
    if c.resume:
        try:
            with open(os.path.join(folder, "options.json"), encoding="utf-8") as f:
                base = json.load(f)
            os.stat(os.path.join(folder, "state.pt"))
            for name in base.keys() | defaults.keys():
                if type(base.get(name)) is not type(defaults.get(name)):
                    raise ValueError("its options.json was written by a different version of train.py")
        except (OSError, ValueError, AttributeError) as error:
            parser.error(f"--resume=True: the run in {folder} cannot be continued: {error}")
        base.update(resume=True, overwrite=False)
        changed = [name for name in given if name not in CHANGEABLE and given[name] != base[name]]
        # a rate that decays is at its end at the last step
        if base["lr_decay"] != "constant" and given.get("max_steps", base["max_steps"]) != base["max_steps"]:
            changed.append("max_steps")
    elif "epochs" in given:
        base["max_steps"] = 0
    c = argparse.Namespace(**{**defaults, **base, **given, "out_dir": folder})
    # absolute paths, so that the run can be continued and sampled from any working directory
    for name in PLACES:
        value = os.path.expanduser(getattr(c, name))
        if value in ("reviews", "imdb", "hh", "scratch", "exact"):
            continue
        if os.path.exists(value):
            setattr(c, name, os.path.abspath(value))
        elif glob.glob(value):
            setattr(c, name, os.path.join(glob.escape(os.getcwd()), value))

    # options that would be ignored: whether this run reads them
    task, sft = c.data in eval_imdb.TASKS, c.method == "sft"
    users = {
        "alpha": c.method == "tdpo2",
        "beta ref_from": not sft,
        "texts": c.data == "imdb",
        "eval_data data_split data_config eval_split bad_rows": not task,
        "max_prompt_length max_new_tokens": not (task and sft),
        "reward train_prefixes eval_prefixes completions min_score_gap": task and not sft,
    }
    ignored = []
    for names, used in users.items():
        ignored += [name for name in names.split() if name in given and not used]

    # numbers that are out of range
    for name, value in vars(c).items():
        if type(value) in (int, float) and not abs(value) < 2**63:
            parser.error(f"--{name}={value} must be a finite number below 2^63")
        if name in LEAST and value < LEAST[name]:
            limit = f"must be at least {LEAST[name]}" if LEAST[name] else "must not be negative"
            parser.error(f"--{name}={value} {limit}")
        if name in ("beta", "learning_rate", "epochs") and value <= 0:
            parser.error(f"--{name}={value} must be greater than 0")
        # argparse has seen neither the globals nor a resumed run's options
        if value not in CHOICES.get(name, [value]):
            parser.error(f"--{name}={value} is not one of {', '.join(CHOICES[name])}, or this machine does not have it")

    # options that do not go together
    own = written(folder)
    holds = [name for name in own if os.path.exists(os.path.join(folder, name))]
    others = [x for pattern in FILES for x in glob.glob(pattern, root_dir=folder) if x not in own]
    starts = [os.path.realpath(path) for path in (c.init_from, c.ref_from) if os.path.isdir(path)]
    for fails, message in (
        (changed, f"--{' --'.join(changed)} would change the run in {folder}: leave it out, or choose a new --out_dir"),
        (ignored, f"--{' --'.join(ignored)} would be ignored with --method={c.method} --data={c.data}: leave it out"),
        (c.max_prompt_length >= c.max_length and not (task and sft),
         f"--max_prompt_length={c.max_prompt_length} leaves no room for a response within --max_length={c.max_length}"),
        ("epochs" in given and given.get("max_steps"), "--epochs and --max_steps contradict each other: leave one out"),
        (c.ref_from == "scratch" or c.init_from == "scratch" and c.data != "reviews",
         "scratch is the untrained model that --data=reviews starts from: name a directory or a hub id"),
        (not c.init_from, f"--data={c.data} needs a model: --init_from=DIRECTORY or a hub id"),
        (c.wandb_log and not importlib.util.find_spec("wandb"), "--wandb_log=True: pip install wandb, or leave it out"),
        (os.path.realpath(folder) in starts, f"--out_dir={folder} is a model that the run starts from: name a new one"),
        (c.resume and c.overwrite, "--resume=True and --overwrite=True contradict each other"),
        (holds and not (c.resume or c.overwrite or c.show_data), f"--out_dir={folder} holds a run already: "
         "--resume=True continues it, --overwrite=True replaces it, a different --out_dir keeps it"),
        (others and not (c.resume or c.show_data), f"--out_dir={folder} has files that belong to no run in it: "
         f"{', '.join(others)}; move them, or choose a different --out_dir"),
    ):
        if fails:
            parser.error(message)
    return vars(c)


# -----------------------------------------------------------------------------
# own data: a source gives rows, a row becomes text, text becomes tokens

# a pair, or a text of SFT: the row that it comes from, its prompt as text (None if the whole text is learned), and
# three arrays of token ids, of which rejected is empty for SFT. asked is the prompt without the chat template, whose
# hash decides whether the example is held out
Example = collections.namedtuple("Example", "where prompt_text prompt chosen rejected asked", defaults=[""])

KINDS = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(source, split="", config="", default="train"):
    """[(where, row)] of .jsonl, .json, .csv (also .gz) or .parquet files (with * in a name: of several), of a directory
    that datasets knows, or of a hub dataset, whose split is `default` if none is named. A row that cannot be read is a
    ValueError, which says why. If the source cannot be read, the program ends with one sentence."""
    kind = os.path.splitext(source.lower().removesuffix(".gz"))[1]
    files = [source]
    if not os.path.exists(source):
        files = sorted(glob.glob(source, recursive=True)) or files
    rows = []
    try:
        saved = os.path.exists(os.path.join(source, "state.json"))
        if (split or config) and (saved or kind in KINDS):
            raise ValueError("it has no splits: leave out --data_split, --eval_split and --data_config, and name files")
        # the import of datasets takes seconds, and text files do not need it
        if kind not in KINDS or kind == ".parquet":
            from datasets import load_dataset, load_from_disk

        # files, directories that datasets has saved, and everything else that it knows
        tables = glob.glob(glob.escape(source) + "/**/*.csv*", recursive=True)
        table = []
        if kind == ".parquet":
            table = load_dataset("parquet", data_files=[glob.escape(file) for file in files], split="train")
        elif kind in KINDS:
            for file in files:
                rows += read_text(file, kind)
        elif saved:
            table = load_from_disk(source)
        elif os.path.exists(os.path.join(source, "dataset_dict.json")):
            splits = load_from_disk(source)
            if (split or default) not in splits:
                raise ValueError(f'Unknown split "{split or default}". Should be one of {list(splits)}.')
            table = splits[split or default]
        elif tables and not glob.glob(glob.escape(source) + "/**/*.parquet", recursive=True):
            folder = os.path.dirname(tables[0])
            raise ValueError(f"it is a directory of .csv files: name the files, as in {folder}/*.csv")
        elif os.path.isdir(source) or re.fullmatch(r"[\w-]+/[\w.-]+", source):
            table = load_dataset(source, config or None, split=split or default)
        else:
            raise ValueError("it is no .jsonl, .json, .csv or .parquet file, no directory and no hub id (owner/name)")
        for n, row in enumerate(table, 1):
            rows.append((f"{source} row {n}", without_fillers(row, table.features)))
    except Exception as error:      # the readers of datasets raise all kinds of errors
        reason = reason_of(error)
        if re.search("Unknown split|Config name|BuilderConfig", reason):
            reason += " Options: --data_split, --eval_split, --data_config"
        sys.exit(f"error: cannot read {source}: {reason}")
    if not rows:
        sys.exit(f"error: {source} has no rows")
    return rows


def without_fillers(x, feature):
    """A value of a table without the keys that are null or NaN, with which a table fills up its rows. feature: its type
    in datasets, of which Json holds what was written."""
    if isinstance(x, dict) and isinstance(feature, dict):
        kept = {name: value for name, value in x.items() if value is not None and value == value}
        return {name: without_fillers(value, feature[name]) for name, value in kept.items()}
    if isinstance(x, list):
        return [without_fillers(value, getattr(feature, "feature", None)) for value in x]
    return x


def read_text(path, kind):
    """[(where, row)] of one .jsonl, .json or .csv file, which may be compressed."""
    with open(path, "rb") as f:
        content = f.read()
    if path.lower().endswith(".gz"):
        content = gzip.decompress(content)
    rows = []

    # a cell is text: None, NA and 007 are answers
    if kind == ".csv":
        csv.field_size_limit(2**31 - 1)
        table = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        for n, row in enumerate(table, 1):
            if None in row:
                row = ValueError("has more cells than there are columns: quote those that hold commas")
            rows.append((f"{path} row {n}", row))
        return rows

    # a .json file holds a list of rows, or lines
    if kind == ".json":
        try:
            table = parse_json(content)
        except (ValueError, RecursionError):
            table = None
        if isinstance(table, dict):
            raise ValueError("it holds one object; a .json file holds a list of rows, and a .jsonl file a row a line")
        if isinstance(table, list):
            return [(f"{path} row {n}", row) for n, row in enumerate(table, 1)]

    # line by line, so that a bad line has a number and costs only itself
    for n, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            row = ValueError(f"is not JSON: {error}")
        rows.append((f"{path} line {n}", row))
    return rows


ASSISTANT = "\n\nAssistant:"


def render_transcripts(row, columns, tokenizer):
    """A row of HH's transcripts as text; see `render` below. The prompt is everything up to the last answer."""
    _, *transcripts = columns.values()
    prompt = transcripts[0][:transcripts[0].rindex(ASSISTANT) + len(ASSISTANT)]
    if not all(x.startswith(prompt) for x in transcripts):
        raise ValueError("has two transcripts that differ before the last assistant turn")
    answers = {name: text[len(prompt):] for name, text in columns.items() if name != "prompt"}
    return render_text(row, {"prompt": prompt, **answers}, tokenizer)


def render_text(row, columns, tokenizer):
    """A row of a prompt and its responses, or of a text that is learned whole, as text; see `render`."""
    for name, text in columns.items():
        if name == "prompt" and text is None and "text" in columns:
            continue
        if not isinstance(text, str):
            raise ValueError(f"has no text in {name!r}, nor messages in all of {', '.join(columns)}; its columns are "
                             f"{', '.join(map(str, row))}")
        if name != "prompt" and not text.strip():
            raise ValueError(f"has an empty {name!r}")
    prompt, *responses = columns.values()
    for name in ("system", "tools"):
        if row.get(name):
            raise ValueError(f"has {name!r} beside text: give chosen and rejected as messages, or write it into prompt")
    if prompt is None:
        return None, responses, False, ""

    # an answer to "Hi" may begin with it, too
    if len(prompt.split()) > 2 and all(x.strip().startswith(prompt.strip()) for x in responses):
        raise ValueError("has responses that repeat the prompt: remove it from them")
    if any("\n\nHuman:" in x for x in responses):
        raise ValueError("has a turn of the human in a response: cut it there; beside whole transcripts, remove prompt")
    return prompt, [prompt + x for x in responses], False, prompt


def render_messages(row, columns, tokenizer):
    """A row of chat messages as text, through the model's template; see `render`. The prompt is the turns that all
    conversations begin with."""
    # whole conversations: the prompt is a column of messages, a column of text, or the beginning of the conversations
    prompt, *responses = columns.values()
    conversations = [[read_message(x) for x in messages] for messages in responses]
    questions = [x["content"].strip() for x in conversations[0] if x["role"] == "user"]
    if isinstance(prompt, str) and prompt.strip() and not questions:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        before = [read_message(x) for x in prompt]
        if before and all(before[-1] in x for x in conversations):
            raise ValueError("has responses that repeat the prompt's messages: keep these turns in one of the two")
        conversations = [before + x for x in conversations]
    elif prompt and str(prompt).strip() not in ("", *questions):
        raise ValueError("has a prompt that is none of its messages: remove the column, or make it a message")

    conversations = with_system(row, conversations)

    # after the turns that they share there is one answer, and nothing that the model did not write
    first, shared = conversations[0], 0
    for others in zip(*conversations):
        if any(x != others[0] for x in others):
            break
        shared += 1
    # of a single conversation the answer is the last message
    if len(conversations) == 1:
        shared -= 1
    for messages in conversations:
        roles = [x["role"] for x in messages[shared:]]
        if not roles or not (messages[-1]["content"].strip() or messages[-1].get("tool_calls")):
            raise ValueError("has identical or empty responses")
        if shared == 0:
            raise ValueError(f"has no prompt before its answers; its columns are {', '.join(map(str, row))}")
        if roles != ["assistant"]:
            raise ValueError(f"has turns of the {', '.join(roles)} after the shared prompt, but one answer of the "
                             "assistant should follow it: cut the conversation there")

    # the template has to print all of it
    asked = "\n".join(x["content"] for x in first[:shared])
    tools = row.get("tools")
    prompt = chat(tokenizer, first[:shared], tools=tools)
    texts = []
    for messages in conversations:
        texts.append(chat(tokenizer, messages, False, tools))
        check_printed(tokenizer, messages, texts[-1], tools)

    # a generation prompt may open a block that finished turns do not have, say <think>: the prompt ends before it
    if all(x.startswith(prompt) for x in texts):
        return prompt, texts, False, asked
    unanswered = chat(tokenizer, first[:shared], False, tools)
    finished = chat(tokenizer, [*first[:shared], {"role": "assistant", "content": "|"}], False, tools)
    begin = os.path.commonprefix([prompt, finished])
    if not all(x.startswith(begin) for x in texts) or not begin.startswith(unanswered):
        raise ValueError("has a response that, in the chat template, does not continue the prompt")
    return begin, texts, True, asked


def are_messages(row, columns):
    _, *responses = columns.values()
    return all(isinstance(x, list) for x in responses)


def are_transcripts(row, columns):
    prompt, *responses = columns.values()
    return prompt is None and all(isinstance(x, str) and ASSISTANT in x for x in responses)


# forms of rows: (what such a row looks like, the function that renders it). The first one that fits is taken; a row
# that fits none is text. A new form is one more line here; it may read columns of its own from the row
FORMS = [
    (are_messages, render_messages),
    (are_transcripts, render_transcripts),
]


def render(row, tokenizer):
    """A row as text: (prompt, texts, shortened, asked). A ValueError says what is wrong with it; bad rows are counted
    by its words before the first colon.

    texts: the chosen and the rejected response, or the one that SFT learns, each with the prompt in front of it.
    prompt: None if SFT learns the whole text. shortened: whether the prompt ends before the chat template's generation
    prompt does. asked: the prompt without the template.
    """
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")

    # the columns that are read, {name: text or messages}, the prompt first
    row = {name: value for name, value in row.items() if value is not None}
    names = ["chosen", "rejected"]
    if method == "sft":
        names = [name for name in ("chosen", "completion", "messages", "text") if name in row][:1] or ["chosen"]
    columns = {name: row.get(name) for name in ("prompt", *names)}

    # refuse what would be lost, or is not meant
    check_columns(row, columns)
    if method == "sft" and str(row.get("label")).strip().lower() == "false":
        raise ValueError("has the label false: its answer is not to be learned")
    if "tools" in row:
        row["tools"] = read_tools(row)

    for looks_like, render_form in FORMS:
        if looks_like(row, columns):
            return render_form(row, columns, tokenizer)
    return render_text(row, columns, tokenizer)


def encode(where, prompt, texts, ids, joint, tokenizer, stops):
    """The Example, of lists, of the prompt and texts that `render` returns, and of their tokens, ids and joint: prompt
    and response are tokenized together, as the model would write them. Every response ends in exactly one EOS."""
    # of a text that is learned whole, the first token is the prompt
    if prompt is None:
        ids = joint[0][:1]
    # the prompt is what all of them begin with
    shared = len(os.path.commonprefix([ids, *joint]))
    responses = [x[shared:] for x in joint]
    if prompt is not None and (shared < len(ids) or min(map(len, responses)) == 0):
        # a token lies across a border: tokenize all responses by themselves, if possible after the end of a line, where
        # no tokenizer puts a space in front
        line = tokenizer("\n", add_special_tokens=False)["input_ids"]
        for n, text in enumerate(texts):
            text = text[len(prompt):]
            after_line = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
            if after_line[:len(line)] == line:
                responses[n] = after_line[len(line):]
            else:
                responses[n] = tokenizer(text, add_special_tokens=False)["input_ids"]

    # a text or a template may end in EOS, perhaps in several, and in space after it: keep the first EOS after the last
    # real token, or add one
    for n, response in enumerate(responses):
        end = len(response)
        while end and (response[end - 1] in stops or not tokenizer.decode(response[end - 1]).strip()):
            end -= 1
        while end < len(response) and response[end] not in stops:
            end += 1
        if end == len(response):
            responses[n] = response + [tokenizer.eos_token_id]
        else:
            responses[n] = response[:end + 1]
    chosen, rejected = (responses + [[]])[:2]
    return Example(where, prompt, ids, chosen, rejected)


def cut(example, tokenizer):
    """The example within max_length. As in DPO, first the prompt loses its beginning, down to max_prompt_length, then
    both responses lose their ends. The prompt keeps its BOS."""
    if len(example.prompt) + max(len(example.chosen), len(example.rejected)) <= max_length:
        return example
    prompt = example.prompt
    if len(prompt) > max_prompt_length:
        first = opening(tokenizer) or [tokenizer.bos_token_id]
        if prompt[:len(first)] != first:
            first = []
        rest = max(0, max_prompt_length - len(first))
        prompt = (first + prompt[len(prompt) - rest:])[:max_prompt_length]
    room = max_length - len(prompt)
    chosen, rejected = example.chosen[:room], example.rejected[:room]
    if chosen == rejected:
        raise ValueError(f"has responses that are the same within --max_length={max_length}")
    return example._replace(prompt=prompt, chosen=chosen, rejected=rejected)


def make_examples(rows, source, model, tokenizer):
    """(examples, counts) of [(where, row)]. Bad rows are left out, counted and shown; the program ends if they are more
    than a share bad_rows of all rows."""
    examples, bad = [], collections.defaultdict(list)
    counts = collections.Counter(read=len(rows))
    stops = stop_tokens(model, tokenizer)
    known = len(model.get_input_embeddings().weight)
    for begin in tqdm(range(0, len(rows), 1000), desc="reading", leave=False, disable=None):
        # a thousand rows become text, and then tokens in one call, which uses all cores
        rendered, texts = [], []
        for where, row in rows[begin:begin + 1000]:
            try:
                prompt, whole_texts, shortened, asked = render(row, tokenizer)
                # this is a ValueError if a text has half a surrogate pair
                "".join(whole_texts).encode()
                rendered.append((where, prompt, whole_texts, shortened, asked or whole_texts[0]))
                texts += [prompt or "", *whole_texts]
            except ValueError as error:
                bad[str(error).split(":")[0]].append(f"{where} {error}")
        encoded = iter(encode_prompts(tokenizer, texts) if texts else [])

        for where, prompt, whole_texts, shortened, asked in rendered:
            ids, *joint = itertools.islice(encoded, 1 + len(whole_texts))
            try:
                whole = encode(where, prompt, whole_texts, ids, joint, tokenizer, stops)
                highest = max([*whole.prompt, *whole.chosen, *whole.rejected])
                if highest >= known:
                    raise ValueError(f"has a token that the model does not know: {highest} of {known}")
                if whole.chosen == whole.rejected:
                    raise ValueError("has identical responses")
                example = cut(whole, tokenizer)
            except ValueError as error:
                bad[str(error).split(":")[0]].append(f"{where} {error}")
                continue
            counts["shortened"] += shortened
            counts["truncated"] += example != whole
            counts["beheaded"] += example.prompt != whole.prompt
            arrays = [np.array(x, np.int32) for x in (example.prompt, example.chosen, example.rejected)]
            examples.append(Example(where, prompt, *arrays, asked))

    # the most frequent reasons, each with its first row
    counts["left out"] = len(rows) - len(examples)
    summary = f"{source}: {counts['left out']} bad rows of {len(rows)}"
    for wheres in sorted(bad.values(), key=len, reverse=True)[:3]:
        summary += f"; {len(wheres)} x {wheres[0]}"
    if counts["left out"] > bad_rows * len(rows) or not examples:
        sys.exit(f"error: {summary}. --bad_rows={bad_rows:g} is the share that may be left out; raise it to go on")
    if bad:
        print(summary)
    return examples, counts


def hold_out(examples, read):
    """(examples to train on, held-out examples), no prompt in both. A hash of seed and prompt decides, so that SFT and
    TDPO hold out the same prompts, whatever rows either leaves out: a tenth, halved until eval_pairs of the read rows
    are expected to suffice."""
    share = 0.1
    while share * read > eval_pairs:
        share /= 2

    def place(example):
        digest = hashlib.sha256(json.dumps([seed, example.asked]).encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64
    ranked = sorted(examples, key=place)
    first, last = place(ranked[0]), place(ranked[-1])
    if first == last:
        sys.exit("error: all pairs share one prompt, so none can be held out: add prompts, or name --eval_data")
    # at least one prompt is held out, and one is not
    if not first < share <= last:
        share = math.nextafter(first, 1)
    return [x for x in examples if place(x) >= share], [x for x in ranked if place(x) < share]


def show_examples(examples, tokenizer, count):
    """Print the first examples as the model sees them, and the lengths of all."""
    for example in examples[:count]:
        print(f"\n{example.where}\n  prompt   |" + tokenizer.decode(example.prompt).replace("\n", "\\n"))
        for name in ("chosen", "rejected"):
            tokens = "".join(f"[{tokenizer.decode(token)}]" for token in getattr(example, name))
            if tokens:
                print(f"  {name:8} |" + tokens.replace("\n", "\\n"))
    print("\ntokens in [] carry loss; special tokens are shown; \\n is the end of a line\n")
    print("tokens    median   90 %   99 %    most")
    for name in ("prompt", "chosen", "rejected"):
        lengths = [len(getattr(example, name)) for example in examples]
        print("{:8} {:7.0f} {:6.0f} {:6.0f} {:7.0f}".format(name, *np.percentile(lengths, (50, 90, 99, 100))))


def hash_of(arrays):
    """A short hash of arrays of numbers and of their lengths."""
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(np.array(len(x)))
        digest.update(np.ascontiguousarray(x))
    return digest.hexdigest()[:16]


def hash_of_weights(model):
    """A hash of up to 10^5 numbers of each weight."""
    # sorted by name, because weights that are kept in bf16 come in a different order
    weights = [p.detach().flatten() for _, p in sorted(model.named_parameters())]
    return hash_of(x[::1 + len(x) // 10**5].float().cpu().numpy() for x in weights)


# -----------------------------------------------------------------------------
# rows: several whole pairs in one row, each with its prompt once; a row is what a forward pass takes
#
#     ids        P0 P1 P2  W0 W1 W2  L0 L1   P0 P1  W0  L0 L1   .  .      prompts P, chosen W, rejected L, padding
#     position    0  1  2   3  4  5   3  4    0  1   2   2  3   0  0      both responses continue the prompt
#     pair        0  0  0   0  0  0   0  0    1  1   1   1  1  -1 -1
#     part        0  0  0   1  1  1   2  2    0  0   1   2  2   0  0
#
# P2 predicts W0 and L0, W0 predicts W1 and so on; the last tokens, here W3 and L2, are only labels


def size(example):
    """Tokens of an example in a row: all but the last of each response."""
    return len(example.prompt) + max(0, len(example.chosen) - 1) + max(0, len(example.rejected) - 1)


def pack(lengths, row_tokens):
    """Rows (lists of indices) whose lengths sum to at most row_tokens: first fit, longest first."""
    # free: places left in each row
    rows, free = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [r for r, space in enumerate(free) if space >= lengths[i]]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            free.append(row_tokens)
        rows[fitting[0]].append(i)
        free[fitting[0]] -= lengths[i]
    return rows


def collate(examples, row_length=0, device="cpu"):
    """A row of whole pairs on the device: ids and position (1, L); for the N response tokens predictor (index of the
    token that predicts it), labels and, on the CPU, pair and chosen; attention: the model's arguments.

    A row_length pads the row and makes it one for FlexAttention; without one, each pair attends by itself."""
    ids, position, row_pair, part = [], [], [], []
    predictor, labels, pair, chosen = [], [], [], []
    for n, example in enumerate(examples):
        # the prompt, once
        prompt = np.asarray(example.prompt).tolist()
        ids += prompt
        position += range(len(prompt))
        row_pair += [n] * size(example)
        part += [0] * len(prompt)
        last = len(ids) - 1

        # its responses; SFT has no rejected one
        for k, response in enumerate((example.chosen, example.rejected), 1):
            response = np.asarray(response).tolist()
            if not response:
                continue
            predictor += [last, *range(len(ids), len(ids) + len(response) - 1)]
            labels += response
            pair += [n] * len(response)
            chosen += [k == 1] * len(response)
            ids += response[:-1]
            position += range(len(prompt), len(prompt) + len(response) - 1)
            part += [k] * (len(response) - 1)
    padding = max(0, row_length - len(ids))
    ids += [0] * padding
    position += [0] * padding
    row_pair += [-1] * padding
    part += [0] * padding

    # pinned, because otherwise the copy may wait until the device has finished its work
    pin = torch.device(device).type == "cuda"
    columns = []
    for x in (ids, position, row_pair, part, predictor, labels):
        columns.append(torch.tensor(x, pin_memory=pin).to(device, non_blocking=pin))
    ids, position, row_pair, part, predictor, labels = columns
    layout = block_mask(row_pair, part) if row_length else pair_masks(row_pair, part, map(size, examples))
    # if it is given a mask, even one of a single element, the model makes none of its own
    attention = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device), "layout": layout}
    return dict(ids=ids[None], position=position[None], predictor=predictor, labels=labels, pair=torch.tensor(pair),
                chosen=torch.tensor(chosen), attention=attention)


def sees(q, k, pair, part):
    """Whether the token at q attends to the one at k, both indices of a row: to itself and to the tokens before it in
    its own pair, of the prompt (part 0) and of its own response (1 chosen, 2 rejected)."""
    return (k <= q) & (pair[k] == pair[q]) & ((part[k] == 0) | (part[k] == part[q]))


def block_mask(pair, part):
    """`sees` for FlexAttention, which skips the blocks of a row that are hidden everywhere."""
    def mask(batch, head, q, k):
        return sees(q, k, pair, part)
    return create_block_mask(mask, None, None, len(pair), len(pair), device=pair.device)


def pair_masks(pair, part, sizes):
    """(sizes, masks, {}). Each pair of L tokens has an (L, L) mask, which is added to attention scores: it is 0 where
    `sees` is true, else the lowest number. Layers keep the masks in their own dtype and shape in the dict."""
    sizes, masks = list(sizes), []
    for own_pair, own_part in zip(pair.split(sizes), part.split(sizes)):
        token = torch.arange(len(own_pair), device=pair.device)
        hidden = ~sees(token[:, None], token, own_pair, own_part)
        mask = torch.zeros(hidden.shape, device=pair.device)
        masks.append(mask.masked_fill(hidden, torch.finfo(torch.float32).min))
    return sizes, masks, {}


def pair_attention(module, query, key, value, attention_mask, layout=None, scaling=None, **options):
    """Attention for rows of pairs in any model that takes a registered function: (1, heads, L, D) -> (1, L, heads, D).

    A block mask is for FlexAttention. Otherwise each pair attends by itself in plain products, in a fraction of the
    time that torch's flash kernel takes for the whole row. Without packed rows it is sdpa.
    """
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError("its attention has softcapping or sinks, which only its own implementation computes")
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    # under autocast, rotary embeddings leave query and key in fp32
    query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(layout, BlockMask):
        return flex_attention_forward(module, query, key, value, layout, scaling=scaling, **options)

    sizes, masks, ready = layout
    heads, kv_heads = query.shape[1], key.shape[1]
    width = query.shape[-1]
    # the heads that share a key and value are stacked along the tokens. The first layer makes the masks for that form
    form = value.dtype, heads // kv_heads
    if form not in ready:
        ready[form] = [mask.to(value.dtype).repeat(heads // kv_heads, 1) for mask in masks]
    out = []
    queries, keys, values = (x[0].split(sizes, 1) for x in (query, key, value))
    for q, k, v, mask in zip(queries, keys, values, ready[form]):
        scores = torch.baddbmm(mask, q.reshape(kv_heads, -1, width), k.mT, alpha=scaling or width**-0.5)
        attended = scores.softmax(-1) @ v
        out.append(attended.view(heads, -1, v.shape[-1]).transpose(0, 1))
    return torch.cat(out)[None], None


AttentionInterface.register("pair_attention", pair_attention)
AttentionMaskInterface.register("pair_attention", sdpa_mask)


def response_states(body, model, batch):
    """Hidden states (N, d) that predict the response tokens, and a column of ones if the output layer has a bias."""
    out = body(input_ids=batch["ids"], position_ids=batch["position"], use_cache=False, **batch["attention"])
    hidden = out.last_hidden_state[0][batch["predictor"]]
    if getattr(model.get_output_embeddings(), "bias", None) is None:
        return hidden
    return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)


def output_weight(model):
    """The output layer (V, d), with its bias as one more column."""
    layer = model.get_output_embeddings()
    if getattr(layer, "bias", None) is None:
        return layer.weight
    return torch.cat([layer.weight, layer.bias[:, None]], 1)


def sft_loss(hidden, weight, labels):
    """Cross-entropy (N,) in nats of labels (N,), from the hidden states (N, d) and the output layer (V, d). The logits
    of one chunk of tokens exist at a time, and are computed again on the way back."""
    def chunk_loss(hidden, labels):
        return F.cross_entropy(F.linear(hidden, weight), labels, reduction="none")
    tokens = max(1, CHUNK_BYTES // 4 // (4 * len(weight)))
    losses = []
    for h, y in zip(hidden.split(tokens), labels.split(tokens)):
        losses.append(checkpoint(chunk_loss, h, y, use_reentrant=False))
    return torch.cat(losses)


@torch.no_grad()
def packing_error(model, examples, row_length=0, shortest=0):
    """The reason why packed rows are wrong for this model, or "" if every response token gets the same logits as in a
    sequence by itself.

    If the configuration gives the reason it is read there, because its effect on these examples may be small. The
    comparison finds reasons that nobody has thought of. It holds logits of CHUNK_BYTES at a time. shortest: tokens of
    the data's shortest sequence.
    """
    config = model.config.get_text_config()
    longest = max(len(e.prompt) + max(len(e.chosen), len(e.rejected)) - 1 for e in examples)
    mixing = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv1d)]
    mixing += [x for x in getattr(config, "layer_types", None) or () if re.search("linear|mamba|recurrent|conv", x)]
    if mixing:
        return f"it has recurrent or convolutional layers ({mixing[0]}), which mix the sequences of a row"
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1):
            return f"its {name} of {getattr(config, name)} changes logits after the output layer"
    for name in ("sliding_window", "attention_chunk_size"):
        if (getattr(config, name, None) or longest) < longest:
            return f"its {name} of {getattr(config, name)} tokens is shorter than a prompt and response of {longest}"

    border = rope_border(model)
    if shortest <= border < longest:
        return (f"its LongRoPE changes the frequencies of a sequence of up to {border} tokens if a longer one is in "
                f"the same row: use --max_length={border}, or leave out the shorter ones")

    if model.base_model is model:
        return "transformers does not separate its body from its output layer"

    # one row, and every sequence by itself. Some models that declare no attention function take one all the same
    cause = ""
    if not model._supports_attention_backend:
        cause = "its layers take no attention function from outside, which packed rows need: "
    try:
        batch = collate(examples, row_length, model.device)
        packed = response_states(model.base_model, model, batch)
        weight = output_weight(model).T.float()
        tokens = max(1, CHUNK_BYTES // (4 * weight.shape[1]))
        begin, gap = 0, 0
        for example in examples:
            for response in filter(len, (example.chosen, example.rejected)):
                ids = torch.tensor([[*example.prompt, *response[:-1]]], device=model.device)
                places = torch.arange(len(example.prompt) - 1, ids.shape[1], device=model.device)
                for keep in places.split(tokens):
                    alone = model(ids, use_cache=False, logits_to_keep=keep).logits[0].float()
                    logits = packed[begin:begin + len(keep)].float() @ weight
                    off = (logits - alone).abs().amax(1) / alone.std(1).clamp(min=1e-6)
                    gap = max(gap, off.max().item())
                    begin += len(keep)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:      # models raise different errors for arguments that they do not know
        if "allocate memory" in str(error):
            raise
        return cause + str(error).split("\n")[0]
    if not gap < 1e-3:
        return f"{cause}packed rows give other logits than separate sequences (off by {gap:.1g} standard deviations)"
    return ""


# -----------------------------------------------------------------------------
# adapters


class Adapter(torch.nn.Module):
    """A linear layer's weight W as W + 32/rank B A, of which B and A are trained (LoRA: Hu et al., arXiv:2106.09685;
    the factor makes the learning rate independent of the rank). B is 0 at first. Rank 0 is W by itself, kept in bf16.

    Autocast takes a bf16 W as it is, and rounds the sum as it does every weight. Without autocast both are fp32."""
    def __init__(self, weight, rank):
        super().__init__()
        self.rank = rank
        rows, columns = weight.shape
        if rank:
            # drawn on the CPU: the same numbers on any device
            A = torch.empty(rank, columns).uniform_(-1, 1) / columns**0.5
            self.A = torch.nn.Parameter(A.to(weight.device))
            self.B = torch.nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight):
        if not torch.is_autocast_enabled(weight.device.type):
            weight = weight.float()
        if self.rank:
            weight = weight + (self.B @ self.A * (32 / self.rank)).to(weight.dtype)
        return weight


def blocks_of(model):
    """The blocks of its text model, by transformers' own list of modules that stay in one piece. FSDP renames them."""
    text = model.get_decoder()
    return [m for m in text.modules() if type(m).__name__.removeprefix("FSDP") in (model._no_split_modules or ())]


def linear_layers(model):
    """The linear layers of its blocks."""
    return [m for block in blocks_of(model) for m in block.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]


def adapt(model, rank, low):
    """Freeze a model and put adapters on the linear layers of its blocks; with rank 0 nothing of it is trained.

    low: the weights of these layers become bf16, always if they get adapters, else only if that loses nothing.
    Embeddings and norms stay in fp32. Autocast does not round those either, so its results are the same to the bit.
    """
    layers = linear_layers(model)
    if rank and not layers:
        sys.exit(f"error: --lora_rank={rank}: {type(model).__name__} has no blocks with linear layers; leave it out")
    model.requires_grad_(False)
    # it may miss the experts of a mixture, for example, which transformers keeps in one tensor
    reached = sum(layer.weight.numel() for layer in layers)
    weights = sum(p.numel() for block in blocks_of(model) for p in block.parameters())
    if rank and reached < 0.9 * weights:
        print(f"note: adapters reach {reached / weights:.0%} of the weights in the blocks of {type(model).__name__}; "
              "the others are not in linear layers, and stay as they are")
    for layer in layers:
        rounded = layer.weight.detach().bfloat16()
        keep = low and (rank > 0 or bool((rounded == layer.weight).all()))
        if keep:
            layer.weight = torch.nn.Parameter(rounded, requires_grad=False)
        if keep or rank:
            parametrize.register_parametrization(layer, "weight", Adapter(layer.weight, rank), unsafe=True)


def without_adapters(model):
    """A frozen model that shares all weights of an adapted one, but has its adapters off."""
    ref = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for m in ref.modules():
        if isinstance(m, Adapter):
            m.rank = 0
    return ref


def checkpoint_blocks(model):
    """Keep no activations of a block for the backward pass, but compute them again. transformers' own switch works only
    in training mode, in which some blocks drop out."""
    if not blocks_of(model):
        sys.exit(f"error: --checkpoint_activations=True: {type(model).__name__} names no blocks; leave it out")
    for block in blocks_of(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


# -----------------------------------------------------------------------------
# processes and checkpoint

# state dicts are gathered whole, so that a checkpoint is the same for any number of processes
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_RANK_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
# what a run writes in its directory, and what would change how its model is read there
FILES = ("state.pt", "options.json", "tdpo.py", "log.jsonl", "log.png", "prompts.jsonl", "evals/[0-9]*",
         "config.json", "generation_config.json", "adapter_config.json", "model*.safetensors*", "tokenizer*.json",
         "vocab*.json", "emoji.json", "*.model", "*.spm", "vocab.txt", "dict.txt", "merges.txt", "bpe.codes",
         "special_tokens_map.json", "added_tokens.json", "chat_template.*", "additional_chat_templates/*")


def join_processes():
    """(rank, number of processes) under torchrun, else (0, 1). Only rank 0 prints and writes. Rows are shown by rank 0,
    without the others."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if show_data:
        return int(os.environ["RANK"]), 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # the others wait for rank 0, which may sample pairs for hours
    dist.init_process_group(timeout=datetime.timedelta(days=1))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size()


def total(x):
    """The sum of a tensor over all processes, which replaces it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def from_rank_0(value):
    """Rank 0's value, in every process. If rank 0 ends with an error, the others end without a traceback."""
    values = [value]
    if dist.is_initialized():
        try:
            dist.broadcast_object_list(values)
        except RuntimeError:
            os._exit(1)
    return values[0]


def share_examples(examples, folder):
    """Rank 0's examples, in every process. The others map the tokens from a file in the folder."""
    path = os.path.join(folder, ".tokens")
    tokens = [x for example in examples for x in example[2:5]]
    if dist.get_rank() == 0:
        with open(path, "wb") as f:
            # other nodes read the file until the run ends, however it ends
            atexit.register(os.remove, path)
            f.write(np.concatenate(tokens))
    lengths = from_rank_0([len(x) for x in tokens])
    if dist.get_rank():
        tokens = np.split(np.asarray(np.memmap(path, np.int32, "r")), np.cumsum(lengths)[:-1])
        examples = [Example("", "", *tokens[n:n + 3]) for n in range(0, len(tokens), 3)]
    return examples


def spread(whole, device, compiled, low, trained):
    """A model that only rank 0 has, spread over all processes, block by block (FSDP2), with each block compiled if
    asked. Its weights are handed out one by one. low: blocks gather weights in bf16, the rest (embeddings, output
    layer) in fp32; gradients are always summed in fp32."""
    parts, weights, buffers = None, {}, {}
    if dist.get_rank() == 0:
        parts = type(whole), whole.config, whole.generation_config
        weights, buffers = whole.state_dict(), dict(whole.named_buffers())
    cls, config, generation_config = from_rank_0(parts)
    with torch.device("meta"):
        model = cls(config).eval().requires_grad_(trained)
    model.generation_config = generation_config
    model.set_attn_implementation("pair_attention")

    # blocks first: each gathers its own weights while it computes
    policy = MixedPrecisionPolicy()
    # a CPU's LayerNorm takes no bf16 weights
    if low and not (device == "cpu" and any(isinstance(m, torch.nn.LayerNorm) for m in model.modules())):
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in blocks_of(model):
        if compiled:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)

    model.to_empty(device=device)
    set_model_state_dict(model, weights, options=FROM_RANK_0)
    # the state dict lacks some buffers, such as rotary frequencies
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    return model


def save(folder, model, tokenizer, opt, step, **origin):
    """Write state.pt, which is the checkpoint (origin: more entries of it), and the Hugging Face files, which are for
    everybody else. They are written beside the old ones and then moved, state.pt first, each in one step. All processes
    call it, rank 0 writes."""
    weights, opt_state = get_state_dict(model, opt, options=FULL)
    if dist.is_initialized() and dist.get_rank():
        return
    # state.pt holds only A and B of adapters, the Hugging Face files hold W + BA
    merged = {name: x for name, x in weights.items() if ".parametrizations." not in name}
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            merged[name + ".weight"] = layer.weight.detach().cpu()
    if len(merged) < len(weights):
        weights = {name: x for name, x in weights.items() if name.endswith((".0.A", ".0.B"))}
    # tied weights are gathered as copies, and become one tensor again
    for name, original in model.all_tied_weights_keys.items():
        merged[name] = merged[original]
    new = os.path.join(folder, ".saving")
    try:
        shutil.rmtree(new, ignore_errors=True)
        os.makedirs(new)
        state = dict(origin, step=step, weights=weights, optimizer=opt_state)
        torch.save(state, os.path.join(new, "state.pt"))
        model.save_pretrained(new, state_dict=merged)
        tokenizer.save_pretrained(new)
        for path in glob.glob(glob.escape(new) + "/**", recursive=True):
            # on the disk, in case the machine fails
            if os.path.isfile(path):
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
    except Exception as error:      # mostly a full disk, for which safetensors and torch raise errors of their own
        shutil.rmtree(new, ignore_errors=True)
        advice = "make room, and start again with --overwrite=True"
        if os.path.exists(os.path.join(folder, "state.pt")):
            advice = "the last checkpoint there is whole: make room, and continue with --resume=True"
        sys.exit(f"error: step {step} could not be saved in {folder}: {error}; {advice}")
    for name in sorted(glob.glob("**", root_dir=new, recursive=True), key=lambda name: name != "state.pt"):
        if os.path.isfile(os.path.join(new, name)):
            os.replace(os.path.join(new, name), claim(folder, name))
    shutil.rmtree(new)


def written(folder):
    """The files that runs have written in a directory, by the record that they keep there."""
    record = os.path.join(folder, ".written")
    # the record is a hidden file, which stays when somebody removes everything in the directory with *
    if not (os.path.exists(record) and os.path.exists(os.path.join(folder, "options.json"))):
        return []
    # a record that came from elsewhere names no file outside the directory
    names = open(record, encoding="utf-8").read().splitlines()
    return [name for name in names if not os.path.isabs(name) and ".." not in name.split("/")]


def claim(folder, name):
    """The path of a file that a run is about to write, entered in the record, in a folder that is made if missing."""
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if name not in written(folder):
        with open(os.path.join(folder, ".written"), "a", encoding="utf-8") as f:
            f.write(name + "\n")
    return path


def start_log(folder, step):
    """The open log of a run, and its options.json and objective, a copy of tdpo.py. A resumed log keeps its lines up to
    the step. A new run removes the files of the run that it replaces, so that none ever lies beside a log that is not
    its own."""
    log = ""
    if resume:
        for record in eval_imdb.read_log(folder, step):
            log += json.dumps(record) + "\n"
    else:
        # options.json is removed last and written first, because the record counts only beside it
        for name in sorted(written(folder), key=lambda name: name == "options.json"):
            path = os.path.join(folder, name)
            if os.path.isfile(path) or os.path.islink(path):
                os.remove(path)
        open(os.path.join(folder, ".written"), "w").close()
    with open(os.path.join(os.path.dirname(__file__), "tdpo.py"), encoding="utf-8") as f:
        objective = f.read()
    # a kill leaves the old ones or the new ones, never a part
    options = json.dumps(knob_values(), indent=1)
    for name, text in (("options.json", options), ("tdpo.py", objective), ("log.jsonl", log)):
        path = claim(folder, name)
        with open(path + ".new", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(path + ".new", path)
    return open(os.path.join(folder, "log.jsonl"), "a", encoding="utf-8", buffering=1)


# -----------------------------------------------------------------------------
# steps, metrics, measurements

@functools.lru_cache(2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def step_indices(step, batch_size, n, seed):
    """The pairs of a step: the next batch_size of an endless stream of permutations of n, each from (seed, epoch)."""
    indices = []
    for k in range(step * batch_size, (step + 1) * batch_size):
        indices.append(int(permutation(n, seed, k // n)[k % n]))
    return indices


def choose_length(sizes, largest, row_tokens, world):
    """The length of rows on a GPU, a multiple of FlexAttention's blocks of 128 that holds the largest example: up to
    row_tokens, the one that thirty steps of the run fill best."""
    steps = [[sizes[i] for i in step_indices(step, batch_size, len(sizes), seed)] for step in range(30)]
    shortest = math.ceil(max(largest, min(1024, row_tokens)) / 128) * 128
    costs = {}
    for length in range(shortest, max(shortest, row_tokens) + 1, 128):
        # each process takes equally many rows; many short ones cost more than few long ones
        rows = sum(math.ceil(len(pack(step, length)) / world) for step in steps)
        costs[length] = rows * (length + 64)
    return min(costs, key=costs.get)


def lr_at(step):
    """The learning rate of a step; the first one is step 0. Another schedule is one more entry of shares, and a name in
    CHOICES."""
    if step < warmup_steps:
        return learning_rate * ((step + 1) / warmup_steps)
    # 0 after the warm-up, 1 at the last step
    done = (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps)
    shares = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return learning_rate * shares[lr_decay]


def preference_metrics(stats):
    """The columns that the log holds means of, a dict of (P,) tensors; stats as from tdpo_loss. acc compares log-ratios
    and is the same for every method; acc_loss is the method's own, margin > 0; the gaps are absolute differences."""
    metrics = dict(stats)
    metrics["acc"] = stats["logratio_w"] > stats["logratio_l"]
    metrics["acc_loss"] = stats["margin"] > 0
    metrics["kl_gap"] = (stats["kl_l"] - stats["kl_w"]).abs()
    metrics["rkl_gap"] = (stats["rkl_l"] - stats["rkl_w"]).abs()
    return metrics


def try_row(batch, forward, opt):
    """Send a row forward and backward once while buffers as large as the optimizer's state are held, and drop the
    gradients, so that a run without enough memory ends before its first step."""
    trained = [p for group in opt.param_groups for p in group["params"]]
    buffers = []
    if not opt.state:
        # RMSprop keeps one moment of each weight, and most others keep two
        moments = 1 if isinstance(opt, torch.optim.RMSprop) else 2
        buffers = [torch.empty_like(p) for p in trained for _ in range(moments)]
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        loss, _ = forward(batch, True)
        loss.backward()
    del buffers
    opt.zero_grad(set_to_none=True)


def peak_gib(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    # ru_maxrss is in bytes on macOS, in KiB on Linux
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def check_positions(model, name):
    """End the program if a model cannot read max_length tokens."""
    positions = positions_of(model)
    if max_length > positions:
        sys.exit(f"error: --max_length={max_length} is more than the {positions} positions of {name}: lower it, and "
                 "--max_prompt_length with it")


def embedded_sft():
    """The directory of the embedded task's SFT model. If it is not there, this same file trains it, and gives it its
    name when it is done."""
    path = os.path.abspath(os.path.join(os.path.dirname(out_dir), f"reviews-sft-{seed}"))
    if os.path.exists(path):
        return path
    command = ["--method=sft", f"--seed={seed}", f"--device={device}", f"--out_dir={path}-new", "--overwrite=True"]
    print("the SFT model first: python train.py " + " ".join(command), flush=True)
    # SIGTERM and SIGHUP end that run, too
    for number in (signal.SIGTERM, *hangup):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        done = subprocess.run([sys.executable, __file__, *command], env={**os.environ, "WORLD_SIZE": "1"})
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if done.returncode:
        sys.exit("error: the SFT run failed; if a second run is at work in its directory, wait for that one")
    os.rename(path + "-new", path)
    print(f"renamed to {path}", flush=True)
    return path


if __name__ == "__main__":
    # -------------------------------------------------------------------------
    # set-up: options, processes, the directory, the device
    launched = time.time()
    # a run under nohup ignores the end of its terminal, and goes on doing so
    hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
    # from here on the globals above are the options of this run
    globals().update(configure(sys.argv[1:]))
    rank, world = join_processes()
    if show_data and rank:
        sys.exit()
    if rank == 0:
        try:
            os.makedirs(out_dir, exist_ok=True)
            lock = open(os.path.join(out_dir, ".lock"), "a")
        except OSError as error:
            sys.exit(f"error: --out_dir={out_dir}: {error}; name a directory that can be written")
        # one run in a directory: the lock lasts as long as this process, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"error: --out_dir={out_dir}: a run is at work in it; name a different directory, or wait")
        except OSError as error:
            print(f"note: the file system has no locks ({error}): start no second run in {out_dir}")
    sft, task = method == "sft", data in eval_imdb.TASKS
    noun = "texts" if sft else "pairs"
    # several processes share models that rank 0 loads; with adapters each of them loads whole ones
    sharded = world > 1 and not lora_rank
    loads = rank == 0 or not sharded

    # the device, and the type in which it multiplies; options.json gets dtype as it is settled here
    device_type = DEVICES[0] if device == "auto" else device
    modern = device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        dtype = "bfloat16" if modern else "float32"
    low = dtype == "bfloat16"
    compiled = compile and modern

    # a chat template may print the date: a resumed run prints the date on which it was first started
    started, state = launched, {}
    if resume and loads:
        try:
            state = torch.load(os.path.join(out_dir, "state.pt"), map_location="cpu", weights_only=True)
            if not state.keys() >= {"step", "weights", "optimizer", "fingerprint", "started"}:
                raise ValueError
            started = state["started"]
        except Exception as error:      # torch's own sentence advises a call that would run code from the file
            sys.exit(f"error: the checkpoint in {out_dir} cannot be read ({type(error).__name__}); restore its "
                     "state.pt, or start again with --overwrite=True")

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(started, tz)
    chat_template_utils.datetime = Clock

    # -------------------------------------------------------------------------
    # the policy as it is loaded
    model = tokenizer = prefixes = None
    # what can be wrong with a task's texts and reward is found before anything is trained
    if task and rank == 0:
        reviews = eval_imdb.load_texts(data, texts)
    if task and not sft:
        # only rank 0 logs, so the others take the reward that costs nothing
        score = eval_imdb.load_reward("exact" if rank else reward, device_type)
    if init_from == "scratch" and not sft and rank == 0:
        init_from = embedded_sft()
    init_from = from_rank_0(init_from)
    if loads:
        if init_from == "scratch":
            model, tokenizer = eval_imdb.scratch_model(seed)
        else:
            model, tokenizer = load_model(init_from)
        check_positions(model, init_from)
        if tokenizer.eos_token_id is None:
            sys.exit(f"error: the tokenizer of {init_from} has no EOS token to end responses; set its eos_token")

    # a task samples before the model is spread or gets adapters
    if task and loads:
        model.to(device_type)

    # -------------------------------------------------------------------------
    # data: rows of a task or of a source, then tokens, then what is held out. Rank 0 prepares them for all processes
    examples, held_out, held_prompts = [], [], {}
    if rank == 0:
        source, held_source, held_rows = data, eval_data, []
        if data == "hh":
            source = "Anthropic/hh-rlhf"
        if eval_split or data == "hh":
            held_source = held_source or source
        if task and sft:
            rows = [(f"text {n}", {"text": text}) for n, text in enumerate(reviews["train"], 1)]
            held_rows = [(f"test text {n}", {"text": text}) for n, text in enumerate(reviews["test"][:eval_pairs], 1)]
        elif task:
            prefixes = eval_imdb.task_prefixes(reviews, tokenizer, seed, train_prefixes, eval_prefixes)
            source = eval_imdb.build_pairs(model, tokenizer, prefixes["train"], score, folder=os.path.dirname(out_dir),
                                           name=data, reward=reward, completions=completions,
                                           min_score_gap=min_score_gap, max_new_tokens=max_new_tokens, seed=seed)
            rows = read_rows(source)
        else:
            rows = read_rows(source, data_split, data_config)
            if held_source:
                # a configuration is one of --data, which may be the source of both
                held_config = data_config if held_source == source else ""
                held_rows = read_rows(held_source, eval_split, held_config, default="test")

        examples, counts = make_examples(rows, source, model, tokenizer)
        if counts["truncated"]:
            print(f"note: {counts['truncated']} {noun} are truncated, {counts['beheaded']} of them at their start")
        if counts["shortened"]:
            print(f"note: {counts['shortened']} prompts end before the chat template's generation prompt does, because "
                  "finished turns do not repeat it (nor, perhaps, reasoning); --show_data shows what is left")
        if show_data:
            show_examples(examples, tokenizer, show_data)
            sys.exit()

        # what is held out
        if held_rows:
            held_out, held_counts = make_examples(held_rows, held_source or source, model, tokenizer)
            order = np.random.default_rng(seed).permutation(len(held_out))
            beyond = max(0, len(held_out) - eval_pairs)
            held_out = [held_out[i] for i in order[:eval_pairs]]
            print(f"held out: {held_counts['read']} read = {len(held_out)} evaluated + {beyond} beyond --eval_pairs + "
                  f"{held_counts['left out']} left out")
        else:
            # no prompt that is held out is trained on, even if it is not evaluated
            examples, held_out = hold_out(examples, counts["read"])
            counts["held out"] = len(held_out)
            if len(held_out) > eval_pairs:
                print(f"note: {len(held_out) - eval_pairs} held-out {noun} beyond --eval_pairs are not evaluated")
                held_out = held_out[:eval_pairs]
        held_prompts = {e.prompt_text: e.prompt.tolist() for e in held_out if e.prompt_text is not None}
        both = held_prompts.keys() & {example.prompt_text for example in examples}
        if both and held_rows:
            print(f"warning: {len(both)} of {len(held_prompts)} held-out prompts are also trained on")
        if task and not sft:
            held_prompts = {prefix: encode_prompt(tokenizer, prefix) for prefix in prefixes["test"]}
        print(f"data: {counts['read']} {noun} read = {len(examples)} to train on + {counts['held out']} held out + "
              f"{counts['left out']} left out")
        del rows, held_rows
    tokenizer, prefixes, held_prompts, n_train = from_rank_0((tokenizer, prefixes, held_prompts, len(examples)))
    if world > 1:
        everything = share_examples(examples + held_out, out_dir)
        examples, held_out = everything[:n_train], everything[n_train:]

    # rows: one takes up to row_tokens, and at least the largest example. On a GPU with bf16 they are all padded to one
    # row_length, so that the model compiles once; elsewhere they have any length, which a row_length of 0 says
    sizes = [size(example) for example in examples]
    largest = max(sizes + [size(example) for example in held_out])
    row_tokens = max(micro_tokens or (8192 if device_type == "cuda" else 1024), largest)
    row_length = 0
    if modern:
        row_length = choose_length(sizes, largest, row_tokens, world)
        row_tokens = row_length

    # -------------------------------------------------------------------------
    # policy and reference, each checked while it is whole, then moved to its device or spread
    # a resumed run has to find its data and its models again
    hashes = [hash_of(x for example in examples + held_out for x in example[2:5])]
    longest = max(examples + held_out, key=lambda e: len(e.prompt) + max(len(e.chosen), len(e.rejected)))
    shortest = min(len(e.prompt) + len(y) - 1 for e in examples + held_out for y in (e.chosen, e.rejected) if len(y))

    def prepared(role, m):
        """A model on its device, or spread. While it is whole, packed rows of the first example and of the one with the
        longest sequence are compared with separate sequences."""
        if not sharded:
            m.to(device_type)
        if loads:
            m.set_attn_implementation("pair_attention")
            # FlexAttention takes a GPU; two examples fit into two rows
            length = 2 * row_length if m.device.type == "cuda" else 0
            problem = packing_error(m, [examples[0], longest], length, shortest)
            if problem:
                sys.exit(f"error: the {role} ({type(m).__name__}) cannot be trained exactly in packed rows: {problem}")
        if sharded:
            m = spread(m, device_type, compiled, low, trained=role == "policy")
        return m
    if lora_rank:
        torch.manual_seed(seed)
        adapt(model, lora_rank, low)
    if loads:
        hashes.append(hash_of_weights(model))
    model = prepared("policy", model)
    models = {"policy": model}

    # the reference; those of its weights that autocast rounds anyway are kept in bf16
    if not sft:
        ref = None
        if lora_rank and not ref_from:
            ref = without_adapters(model)
        elif loads:
            ref = load_reference(ref_from or init_from, tokenizer)
            check_positions(ref, ref_from or init_from)
            if low and not sharded:
                adapt(ref, 0, low)
        if loads:
            hashes.append(hash_of_weights(ref))
        ref = prepared("reference", ref)
        models["reference"] = ref
    if checkpoint_activations:
        checkpoint_blocks(model)

    # -------------------------------------------------------------------------
    # resume and optimizer
    # the reference reads the policy's samples, too
    model.positions = min(positions_of(m) for m in models.values())
    # entries that only the policy or the reference has are padding
    common = min(len(m.get_output_embeddings().weight) for m in models.values())
    n_params = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    # states: the hidden states of a row; one call of it gathers the weights that FSDP has spread
    for m in models.values():
        # a sharded model is compiled block by block
        body = torch.compile(m.base_model, dynamic=False) if compiled and not sharded else m.base_model
        m.states = functools.partial(response_states, body, m)
        register_fsdp_forward_method(m, "states")

    # a new optimizer is one more branch here, and a name in CHOICES. To be resumed it needs a state, as SGD has with
    # momentum
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "rmsprop":
        opt = torch.optim.RMSprop(trained, lr=learning_rate)
    else:
        opt = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    max_steps = max_steps or math.ceil(epochs * len(examples) / batch_size)

    origin = {"fingerprint": " ".join(hashes), "started": started, "wandb_id": state.get("wandb_id")}
    if resume and loads and state["fingerprint"] != origin["fingerprint"]:
        sys.exit(f"error: the data or the model that the run in {out_dir} began with has changed; restore it, or "
                 "start a new run with a different --out_dir")
    step = from_rank_0(state.get("step", 0))
    if resume:
        # of a model with adapters the checkpoint holds only these
        weights = state.get("weights", {})
        if lora_rank:
            frozen = {name: x for name, x in model.state_dict().items() if not name.endswith((".0.A", ".0.B"))}
            weights = {**frozen, **weights}
        options = FROM_RANK_0 if sharded else FULL
        set_model_state_dict(model, weights, options=options)
        set_optimizer_state_dict(model, opt, state.get("optimizer", {}), options=options)
        del state, weights
    if step >= max_steps:
        # a kill may have come before its last files
        save(out_dir, model, tokenizer, opt, step, **origin)
        follow = f"--max_steps={step + max(1, step)} would continue it"
        if lr_decay != "constant":
            follow = "its learning rate has decayed, so it is finished"
        sys.exit(f"error: {out_dir} is at step {step} already; {follow}")

    # the run in three more lines, and notes on what is special about it
    print(f"rows: up to {row_tokens} tokens{', padded' if row_length else ''}; a step is {batch_size} {noun}, about "
          f"{batch_size * sum(sizes) // len(sizes)} tokens")
    reference = ""
    if not sft:
        reference = f"; reference {ref_from or init_from}"
    print(f"model: {init_from}, {n_params / 1e6:.2f}M parameters, {n_trained / 1e6:.2f}M of them trained{reference}")
    objective = method
    if not sft:
        objective += f", beta {beta:g}"
    if method == "tdpo2":
        objective += f", alpha {alpha:g}"
    passes = max_steps * batch_size / len(examples)
    processes = f", {world} processes" if world > 1 else ""
    print(f"run: {objective}, {max_steps} steps ({passes:.1f} epochs), learning rate {learning_rate:g} ({lr_decay}), "
          f"{device_type}, {dtype}{processes}; into {out_dir}", flush=True)
    if batch_size > len(examples):
        print(f"note: there are only {len(examples)} {noun}: a step of --batch_size={batch_size} takes some twice")
    if warmup_steps > max_steps:
        print(f"warning: --warmup_steps={warmup_steps} is more than the {max_steps} steps: the learning rate gets no "
              f"higher than {lr_at(max_steps - 1):.2g} of {learning_rate:g}. Lower it, or train for longer")
    if getattr(model.config.get_text_config(), "router_aux_loss_coef", None):
        print("note: the loss that balances this model's experts (router_aux_loss_coef) is not part of the objective")

    # -------------------------------------------------------------------------
    # parts of the loop, as functions
    def rows_of(examples):
        """This process's rows of a step: (batch, whether it is real). The processes meet in every pass, so each needs
        equally many rows: a process that would have fewer repeats a row, which is not real and counts for nothing."""
        packed = pack([size(example) for example in examples], row_tokens)
        for k in range(rank, math.ceil(len(packed) / world) * world, world):
            row = [examples[i] for i in packed[min(k, len(packed) - 1)]]
            yield collate(row, row_length, device_type), k < len(packed)

    def forward(batch, real):
        """The loss, a sum over the row's pairs (sft: tokens), and stats, a value for each; 0 and none if not real."""
        with torch.autocast(device_type, torch.bfloat16, enabled=low):
            hidden = model.states(batch)
            if sft:
                losses = sft_loss(hidden, output_weight(model), batch["labels"])
                loss, stats = losses.mean(), {"loss": losses.detach()}
            else:
                with torch.no_grad():
                    ref_hidden = ref.states(batch)
                loss, stats = fused_tdpo_loss(hidden, output_weight(model)[:common], ref_hidden,
                                              output_weight(ref)[:common], batch["labels"], batch["pair"],
                                              batch["chosen"], method, beta=beta, alpha=alpha)
        n = len(stats["loss"]) if real else 0
        return loss * n, {name: x[:n] for name, x in stats.items()}

    def terms(examples):
        """The number of losses that the loss of these examples is the mean of: one for each pair, or for each token of
        sft."""
        if sft:
            return sum(len(example.chosen) for example in examples)
        return len(examples)

    def means(stats, n):
        """Metrics over the n pairs (sft: tokens) of all processes, from the stats of each pass of this one."""
        columns = {name: torch.cat([s[name] for s in stats]) for name in stats[0]}
        if not sft:
            columns = preference_metrics(columns)
        # one sum over processes for all of them
        sums = torch.stack([x.float().sum() for x in columns.values()])
        return dict(zip(columns, total(sums) / n))

    def write(kind, record, watched):
        """One JSON line in the log, and on the screen the columns that a person watches."""
        log.write(json.dumps(record) + "\n")
        if rank == 0 and wandb_log:
            try:
                wandb.log(record, step=step)
            except Exception as error:
                print(f"warning: wandb.log failed: {error}")
        cells = [f"{name.removeprefix('eval_')} {record[name]:>6.3g}" for name in watched if name in record]
        # a terminal that is gone ends no run
        if cells:
            with contextlib.suppress(OSError):
                print(f"{kind} {step:>{len(str(max_steps))}} | " + " | ".join(cells), flush=True)

    @contextlib.contextmanager
    def sampling():
        """Uncompiled, because torch.compile would compile anew for every length of a prompt; and in bf16 if FSDP
        gathers blocks in bf16, which then take no fp32 states."""
        rounded = torch.autocast(device_type, torch.bfloat16, enabled=sharded and low)
        with torch.compiler.set_stance("force_eager"), rounded:
            yield

    @torch.no_grad()
    def evaluate(quick=False):
        """Log the metrics on the held-out examples and, in a task, the scores of fresh samples. The program ends if the
        weights are broken; quick looks only for that, on one example."""
        evaluated = held_out[:1] if quick else held_out
        bar = tqdm(rows_of(evaluated), desc="evaluating", leave=False, disable=None)
        stats = [forward(batch, real)[1] for batch, real in bar]
        metrics = {name: x.item() for name, x in means(stats, terms(evaluated)).items()}

        # nothing broken is saved
        if not math.isfinite(metrics["loss"]):
            sys.exit(f"error: the held-out loss after step {step} is {metrics['loss']}, so this step is not saved. "
                     "Lower --learning_rate")
        if quick:
            return

        # a task's own measure
        if task and not sft:
            with sampling():
                scores, samples = eval_imdb.score_policy(model, ref, tokenizer, prefixes["test"], score,
                                                         max_new_tokens, seed)
            metrics.update(scores)
            # runs of one seed have the same prefixes, so that they can be compared one by one
            if rank == 0:
                write_lines(claim(out_dir, f"evals/{step}.jsonl"), samples)
        record = {"eval_" + name: x for name, x in metrics.items()}
        record = {"step": step, **record, "eval_pairs": len(held_out)}
        watched = ("loss", "acc", "kl_w", "kl_l", "reward", "sample_kl")
        write("eval", record, ["eval_" + name for name in watched])

    # -------------------------------------------------------------------------
    # before the first step: memory, W&B, the log, signals
    # on a GPU the fullest row of the longest examples shows whether memory suffices, before anything is replaced
    if device_type == "cuda":
        # in all processes the same one, so that they run out of memory together
        fullest = sorted(examples, key=size)[-batch_size:]
        row = pack([size(example) for example in fullest], row_tokens)[0]
        try_row(collate([fullest[i] for i in row], row_length, device_type), forward, opt)
        # the peak of the steps and evaluations, not of what prepared them
        torch.cuda.reset_peak_memory_stats()

    # W&B comes first: if it fails, nothing in the directory has been replaced yet
    if rank == 0 and wandb_log:
        try:
            import wandb
            run = wandb.init(project="tdpo", name=os.path.basename(out_dir), config=knob_values(), dir=out_dir,
                             id=origin["wandb_id"], resume="allow")
            origin["wandb_id"] = run.id
        except Exception as error:
            sys.exit(f"error: --wandb_log=True: {' '.join(str(error).split())}")

    # the log, and prompts for sample.py
    log, whole = open(os.devnull, "w"), []
    if rank == 0:
        log = start_log(out_dir, step)
    if rank == 0 and held_prompts:
        # a prompt that was cut for training has no text of its own
        for prompt, ids in held_prompts.items():
            if not len(ids) == max_prompt_length < len(encode_prompt(tokenizer, prompt)):
                whole.append({"prompt": prompt})
        if len(whole) < len(held_prompts):
            print(f"note: {len(held_prompts) - len(whole)} held-out prompts were cut, and are not in prompts.jsonl")
        write_lines(claim(out_dir, "prompts.jsonl"), whole)

    # the first of these signals lets the step finish and saves. A second one leaves at once, but not SIGHUP, and none
    # that comes right after the first: torchrun hands on signals that its processes may have got already
    signals = []

    def stop_after_step(number, frame):
        signals.append((time.time(), number))
        if number != signal.SIGHUP and signals[-1][0] - signals[0][0] > 3:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
    for number in (signal.SIGINT, signal.SIGTERM, *hangup):
        signal.signal(number, stop_after_step)

    # -------------------------------------------------------------------------
    # the loop
    began_at = step
    batch_of = functools.partial(step_indices, batch_size=batch_size, n=len(examples), seed=seed)
    batches = list(rows_of([examples[i] for i in batch_of(step)]))
    while True:
        # once in a while: evaluate and save. A save follows an evaluation: broken weights never replace good ones
        stop = len(signals) > 0
        if world > 1:               # a signal may reach some processes later
            stop = total(torch.tensor(float(stop), device=device_type)).item() > 0
        due_eval = step in (0, max_steps) or eval_interval and step % eval_interval == 0
        due_save = step == max_steps or save_interval and step % save_interval == 0
        # a resumed run has evaluated its first step before
        if step == 0 or step > began_at:
            if due_eval or due_save:
                evaluate()
            elif stop:
                evaluate(quick=True)
            if step > 0 and (due_save or stop):
                save(out_dir, model, tokenizer, opt, step, **origin)
        if step == max_steps:
            break
        if stop:
            follow = f"continue: python train.py --resume=True --out_dir={shlex.quote(out_dir)}"
            if step == 0:
                follow = "no step was made, so nothing is saved"
            print(f"stopped after step {step} | {follow}", flush=True)
            number = signals[0][1] if signals else signal.SIGTERM
            sys.exit(128 + number)

        # one step: its loss is one mean, however its pairs are packed; FSDP takes the mean over processes
        began = time.perf_counter()
        for group in opt.param_groups:
            group["lr"] = lr_at(step)
        indices = batch_of(step)
        count = terms([examples[i] for i in indices])
        # on a CPU the gradients stay in place, because otherwise the heap would grow
        opt.zero_grad(set_to_none=device_type != "cpu")
        stats = []
        for batch, real in batches:
            loss, row_stats = forward(batch, real)
            (loss * ((world if sharded else 1) / count)).backward()
            stats.append(row_stats)
        # a checkpoint needs a state of every parameter, also of a vision tower, which no gradient reaches
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        # the next step's rows are laid out while the device still works on this one's
        batches = list(rows_of([examples[i] for i in batch_of(step + 1)]))
        if not sharded:
            for p in trained:
                total(p.grad)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        metrics = means(stats, count)
        metrics["grad_norm"] = norm.full_tensor() if sharded else norm
        # this waits for the device
        metrics = dict(zip(metrics, torch.stack(list(metrics.values())).tolist()))
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            wheres = from_rank_0(", ".join(examples[i].where for i in indices[:8]))
            sys.exit(f"error: the loss ({metrics['loss']}) or the gradient norm ({metrics['grad_norm']}) of step "
                     f"{step + 1} is not finite. Nothing was saved since the last checkpoint: lower --learning_rate, "
                     f"or look at these {noun}: {wheres}")
        opt.step()
        step += 1

        # log
        seconds = time.perf_counter() - began
        record = {"step": step, "epoch": step * batch_size / len(examples), **metrics}
        record["lr"] = opt.param_groups[0]["lr"]
        record["pairs_per_s"] = batch_size / seconds
        record["tokens_per_s"] = sum(sizes[i] for i in indices) / seconds
        record["peak_gib"] = peak_gib(device_type)
        watched = []
        if step % log_interval == 0 or step == max_steps:
            watched = ["loss", "acc", "kl_w", "kl_l", "pairs_per_s"]
        write("step", record, watched)

    # -------------------------------------------------------------------------
    # the end: three held-out prompts with answers, a picture, the next command
    if held_prompts:
        answering = {"policy": model} if sft else {"reference": ref, "policy": model}
        with sampling():
            eval_imdb.show_answers(answering, tokenizer, list(held_prompts.values())[:3], max_new_tokens, seed,
                                   score if task else None)
    print(f"\npeak memory {peak_gib(device_type):.2f} GiB; {time.time() - launched:.0f} s in all")
    if rank == 0:
        try:
            picture = claim(out_dir, "log.png")
            eval_imdb.draw({os.path.basename(out_dir): eval_imdb.read_log(out_dir)}, picture)
            print(f"wrote {picture}")
        except Exception as error:      # no matplotlib, or a backend or font that fails: the run is saved all the same
            print(f"note: there is no log.png: {error}")
    follow = f" | next: python sample.py --model={shlex.quote(out_dir)}" if whole else ""
    print(f"saved {out_dir} (needs transformers 5){follow}", flush=True)
    if world > 1:
        # exit hard: gloo's threads can abort the process during interpreter shutdown
        if rank == 0 and wandb_log:
            with contextlib.suppress(Exception):
                wandb.finish()
        if rank == 0:
            os.remove(os.path.join(out_dir, ".tokens"))
        dist.destroy_process_group()
        log.close()
        os._exit(0)
