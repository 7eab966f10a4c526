"""Preference-tune a causal language model with TDPO, TDPO2, DPO or f-DPO, or fine-tune it first (SFT). One flat loop.

    python train.py --method=tdpo2 --alpha=0.5                          # the embedded task: no download, no GPU
    python train.py --data=imdb                                         # the paper's sentiment experiment (GPU, hub)
    python train.py --method=sft --data=hh --init_from=EleutherAI/pythia-2.8b --out_dir=out/hh-sft
    python train.py --method=tdpo2 --data=hh --init_from=out/hh-sft
    python train.py --data=pairs.jsonl --init_from=DIR                  # your own pairs: prompt, chosen, rejected
    python train.py --resume=True --out_dir=out/reviews-tdpo2           # continue a run

Paper: Token-level Direct Preference Optimization, Zeng et al., ICML 2024, arXiv:2404.11999. The loss is in tdpo.py.
"""
# Memory on a CPU, set before torch is there: huge pages for its large buffers, few of oneDNN's kernels for each length
# of a row; and glibc keeps freed buffers, as fresh pages at every step cost a third of the embedded task's time.
import ctypes
import os
import sys
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)        # M_TRIM_THRESHOLD
    ctypes.CDLL(None).mallopt(-3, 2**27)            # M_MMAP_THRESHOLD

import argparse
import collections
import contextlib
import copy
import datetime
import fcntl
import functools
import glob
import hashlib
import importlib.util
import json
import logging
import math
import re
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict
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
from sample import (DEVICES, chat, encode_prompt, load_model, load_reference, opening, parse, read_message, read_rows,
                    stop_tokens, without_nulls)
from tdpo import CHUNK_ROWS, fused_sft_loss, fused_tdpo_loss

# -----------------------------------------------------------------------------
# the objective
method = "tdpo2"            # sft, dpo, fdpo, tdpo1 or tdpo2
alpha = 0.5                 # weight of the sequential KL in tdpo2, Eq. 17
beta = 0.1                  # tie to the reference; fdpo wants far less (0.03 on HH, 1e-5 on IMDb)
# data
data = "reviews"            # reviews (embedded), imdb, hh, .jsonl/.json/.csv/.parquet files, a directory, a hub dataset
data_split = ""             # of a directory or hub dataset; default: train
data_config = ""            # of a directory or hub dataset that has several
eval_data = ""              # held-out pairs in the same forms; default: a tenth of the prompts, or hh's test split
eval_split = ""             # the split of eval_data, or, without it, of data, that is held out
eval_pairs = 512            # at most so many of them are evaluated
bad_rows = 0.01             # the largest share of rows that may be left out as unusable; 0 for none
show_data = 0               # print so many rows as the model will see them, and end
max_length = 512            # tokens of a prompt and one response
max_prompt_length = 256     # tokens a prompt is cut to where max_length is exceeded
truncation = "left"         # the side on which such a prompt loses tokens: left or right
# model
init_from = ""              # the policy's start: a directory or hub id; scratch is the embedded task's tiny GPT-2
ref_from = ""               # the reference; default: a frozen copy of init_from
lora_rank = 0               # train adapters of this rank on the blocks' linear layers, 10 times as fast; 0 trains all
checkpoint_activations = False  # compute each block's activations twice rather than keep them; changes no result
# the sentiment task (reviews, imdb): how its pairs are made
texts = "stanfordnlp/imdb"  # reviews for imdb: a hub id, or a .parquet/.jsonl file with text and split (train, test)
reward = "siebert/sentiment-roberta-large-english"  # a text-classification model, or exact, the embedded task's
train_prefixes = 4096       # beginnings of training reviews that are completed
eval_prefixes = 256         # beginnings of test reviews that are completed at every evaluation
completions = 4             # samples for each training prefix; every two make a pair
max_new_tokens = 64         # tokens of a completion
min_score_gap = 0.1         # pairs whose rewards differ by no more are dropped
# optimization (the paper's values)
max_steps = 0               # 0 is one pass over the pairs
batch_size = 64             # pairs a step
micro_tokens = 0            # tokens a forward pass; 0 is 8192 on cuda, 1024 elsewhere; changes no result, but memory
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

CHOICES = {
    "method": ("sft", "dpo", "fdpo", "tdpo1", "tdpo2"),
    "truncation": ("left", "right"),
    "optimizer": ("rmsprop", "adamw"),
    "device": ("auto", "cuda", "mps", "cpu"),
    "dtype": ("auto", "bfloat16", "float32"),
    "compile": ("auto", "True", "False"),
}
# what a task sets in place of the defaults above; an explicit option wins over either
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
# what a resumed run may change
CHANGEABLE = ("resume", "overwrite", "max_steps", "eval_interval", "save_interval", "log_interval", "wandb_log",
              "micro_tokens", "checkpoint_activations", "device", "compile", "out_dir")
# dense bf16 FLOP/s by NVIDIA's data sheets, for MFU
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12, "4090": 165e12}


def configure(argv):
    """The run's options: the globals above, then the task's presets, then --key=value; of a resumed run its own.
    A mistake ends the program with one sentence and exit code 2."""
    # a knob's help is the comment behind it
    knobs = open(__file__, encoding="utf-8").read().split("# ---------")[1]
    knobs = dict(re.findall(r"^(\w+) = .*?  +# (.*)$", knobs, re.M))
    defaults = {name: globals()[name] for name in knobs}
    presets = "\n".join(f"{name}: {preset}" for name, preset in PRESETS.items())
    parser = argparse.ArgumentParser(usage="python train.py [--key=value ...]", description=__doc__, allow_abbrev=False,
                                     epilog=f"in place of these defaults, by --data and --method:\n{presets}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, comment in knobs.items():
        kind, choices = type(defaults[name]), CHOICES.get(name)
        if kind is bool:
            kind, choices = str, ("True", "False")
        parser.add_argument("--" + name, type=kind, choices=choices, metavar="", default=argparse.SUPPRESS,
                            help=f"{comment} [{defaults[name]}]".replace("%", "%%"))
    given = vars(parse(parser, argv))
    for name in given:
        if type(defaults[name]) is bool:
            given[name] = given[name] == "True"

    # the task's presets, or the options of the run that is resumed
    c = argparse.Namespace(**{**defaults, **given})
    preset = PRESETS.get(c.data, {})
    if c.method == "sft":
        preset = {**preset, **PRESETS.get(c.data + " sft", {})}
    # out/pairs-tdpo2 of some/pairs.jsonl
    stem = os.path.splitext(os.path.basename(c.data))[0]
    folder = os.path.normpath(c.out_dir or f"out/{stem}-{c.method}")
    changed = []
    if c.resume:
        try:
            preset = json.load(open(os.path.join(folder, "options.json"), encoding="utf-8"))
            for name in preset.keys() | defaults.keys():
                if type(preset.get(name)) is not type(defaults.get(name)):
                    raise ValueError("options.json is another version's")
        except (OSError, ValueError, AttributeError) as error:
            parser.error(f"--resume=True: {folder} holds no run that can go on: {error}")
        preset.update(resume=True, overwrite=False)
        changed = [name for name in given if name not in CHANGEABLE and given[name] != preset[name]]
    c = argparse.Namespace(**{**defaults, **preset, **given, "out_dir": folder})
    # adapters want about ten times the rate (Schulman et al., LoRA Without Regret, 2025)
    if c.lora_rank and not (c.resume or "learning_rate" in given):
        c.learning_rate *= 10

    # options that would be ignored, and values out of range
    task, sft = c.data in eval_imdb.TASKS, c.method == "sft"
    users = {
        "alpha": c.method == "tdpo2",
        "beta ref_from": not sft,
        "texts": c.data == "imdb",
        "eval_data data_split data_config eval_split bad_rows": not task,
        "max_prompt_length truncation": not (task and sft),
        "reward train_prefixes eval_prefixes completions max_new_tokens min_score_gap": task and not sft,
    }
    ignored = []
    for names, used in users.items():
        ignored += [name for name in names.split() if name in given and not used]
    least = dict(batch_size=1, eval_pairs=1, max_prompt_length=1, train_prefixes=2, max_new_tokens=1, log_interval=1,
                 completions=2, eval_prefixes=2, beta=1e-30, learning_rate=1e-30)
    numbers = {name: x for name, x in vars(c).items() if type(x) in (int, float)}
    wrong = [name for name, x in numbers.items() if not least.get(name, 0) <= x < 2**63]

    # what belongs together
    holds = [x for x in ("options.json", "state.pt", "config.json") if os.path.exists(os.path.join(folder, x))]
    starts = [os.path.realpath(path) for path in (c.init_from, c.ref_from) if os.path.isdir(path)]
    for fails, message in (
        (changed, f"--{' --'.join(changed)} would change the run in {folder}; leave it out, or name another --out_dir"),
        (ignored, f"--{' --'.join(ignored)} would be ignored with --method={c.method} --data={c.data}"),
        (wrong, f"--{' --'.join(wrong)}: too small, or not finite"),
        (c.max_prompt_length >= c.max_length and not (task and sft),
         "--max_prompt_length leaves no room for a response within --max_length"),
        (not c.init_from, f"--data={c.data} needs a model: --init_from=DIRECTORY or a hub id"),
        (c.init_from == "scratch" and c.data != "reviews", "scratch is the untrained model of --data=reviews"),
        (c.wandb_log and not importlib.util.find_spec("wandb"), "--wandb_log=True: pip install wandb, or leave it out"),
        (os.path.realpath(folder) in starts, f"--out_dir={folder} is a model that the run starts from"),
        (c.resume and c.overwrite, "--resume=True and --overwrite=True contradict each other"),
        (holds and not (c.resume or c.overwrite or c.show_data), f"--out_dir={folder} holds another run: --resume=True "
         "continues it, --overwrite=True replaces it, another --out_dir keeps it"),
    ):
        if fails:
            parser.error(message)
    return vars(c)


# -----------------------------------------------------------------------------
# own data: rows, then text, then tokens

# columns that the answer may depend on, and that are not read
UNREAD = ("messages", "history", "conversations", "system_prompt", "system_message", "chat_template_kwargs",
          "functions", "context", "documents", "image", "images", "audio", "audios", "video", "videos")
# messages that were written as text, as a list or one alone
AS_TEXT = r"""\s*\[?\s*\{(?=[^}]*['"](role|from)['"]\s*:)(?=[^}]*['"](content|value)['"]\s*:)"""
ASSISTANT = "\n\nAssistant:"


def render(row, tokenizer, sft=False):
    """A row as text: (prompt, texts, shortened). texts: the chosen and the rejected response, of SFT what is learned,
    each with the prompt in front of it; prompt is None where SFT learns the whole text; shortened tells that the prompt
    ends before the chat template's generation prompt does. ValueError: what is wrong with the row."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")

    # the columns that are read, {name: text or messages}, the prompt first
    row = without_nulls(row)
    names = ["chosen", "rejected"]
    if sft:
        names = [name for name in ("chosen", "completion", "messages", "text") if name in row][:1] or ["chosen"]
    columns = {name: row.get(name) for name in ("prompt", *names)}
    prompt, *responses = columns.values()

    # what would be lost, or is not meant
    for name in UNREAD:
        if row.get(name) and row[name] not in columns.values():
            raise ValueError(f"has {name!r}, which is not read: write it into prompt, system or messages of role and "
                             "content, or remove the column")
    for name, text in columns.items():
        if isinstance(text, str) and re.match(AS_TEXT, text):
            raise ValueError(f"has messages written as text in {name!r}: parse the column (json.loads) first")
    if sft and row.get("label") is False:
        raise ValueError("has the label false: its answer is not to be learned")
    # some tables hold them as JSON
    if isinstance(row.get("tools"), str):
        try:
            row["tools"] = json.loads(row["tools"])
        except (ValueError, RecursionError):
            raise ValueError("has tools that are no JSON")

    if all(isinstance(x, list) for x in responses):
        return render_messages(row, prompt, responses, tokenizer)
    if prompt is None and all(isinstance(x, str) and ASSISTANT in x for x in responses):
        return render_transcripts(row, columns)
    return render_text(row, columns)


def render_transcripts(row, columns):
    """The same of HH's transcripts, whose prompt is all up to the last answer."""
    _, *texts = columns.values()
    prompt = texts[0][:texts[0].rindex(ASSISTANT) + len(ASSISTANT)]
    if not all(x.startswith(prompt) for x in texts):
        raise ValueError("has two transcripts that differ before the last assistant turn")
    answers = {name: text[len(prompt):] for name, text in columns.items() if name != "prompt"}
    return render_text(row, {"prompt": prompt, **answers})


def render_text(row, columns):
    """The same of a prompt and its responses, or of a text that is learned whole."""
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
        return None, responses, False

    if len(set(responses)) < len(responses):
        raise ValueError("has identical responses")
    # an answer to "Hi" may begin so, too
    if len(prompt.split()) > 2 and all(x.strip().startswith(prompt.strip()) for x in responses):
        raise ValueError("has responses that repeat the prompt: take it off them")
    if any("\n\nHuman:" in x for x in responses):
        raise ValueError("has a turn of the human in a response: cut it there; beside whole transcripts, remove prompt")
    return prompt, [prompt + x for x in responses], False


def render_messages(row, prompt, responses, tokenizer):
    """The same of chat messages, through the model's template; the prompt is what all conversations begin with."""
    # whole conversations, whether the prompt is a column of messages, of text, or their beginning
    conversations = [[read_message(x) for x in messages] for messages in responses]
    asked = [x["content"].strip() for x in conversations[0] if x["role"] == "user"]
    if isinstance(prompt, str) and prompt.strip() and not asked:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        before = [read_message(x) for x in prompt]
        if before and all(before[-1] in x for x in conversations):
            raise ValueError("has responses that repeat the prompt's messages: keep these turns in one of the two")
        conversations = [before + x for x in conversations]
    elif prompt and str(prompt).strip() not in ("", *asked):
        raise ValueError("has a prompt that is none of its messages: remove the column, or make it a message")

    # a system column is the first message
    if str(row.get("system", "")).strip():
        system = read_message({"role": "system", "content": row["system"]})
        if any(x["role"] == "system" and x != system for messages in conversations for x in messages):
            raise ValueError("has a system column and another system message: remove one of them")
        conversations = [x if system in x else [system, *x] for x in conversations]

    # behind the turns that they share there is one answer, and nothing that the model did not write
    first, shared = conversations[0], 0
    for others in zip(*conversations):
        if any(x != others[0] for x in others):
            break
        shared += 1
    # of one conversation it is the last message
    if len(conversations) == 1:
        shared -= 1
    for messages in conversations:
        roles = [x["role"] for x in messages[shared:]]
        if not roles or not (messages[-1]["content"].strip() or messages[-1].get("tool_calls")):
            raise ValueError("has identical or empty responses")
        if shared == 0:
            raise ValueError(f"has no prompt before its answers; its columns are {', '.join(map(str, row))}")
        if roles != ["assistant"]:
            raise ValueError(f"has turns of the {', '.join(roles)} behind the prompt in common, where one answer of "
                             "the assistant should be: cut the conversation there")

    # the template may not print all of it
    tools = row.get("tools") or None
    prompt = chat(tokenizer, first[:shared], tools=tools)
    if tools and prompt == chat(tokenizer, first[:shared]):
        raise ValueError("has tools, of which the model's chat template prints nothing")
    texts = []
    for messages in conversations:
        texts.append(chat(tokenizer, messages, False, tools))
        check_printed(tokenizer, messages, tools, texts[-1])

    # a generation prompt may open a block that finished turns do not have, say <think>: the prompt ends before it
    if all(x.startswith(prompt) for x in texts):
        return prompt, texts, False
    asked = chat(tokenizer, first[:shared], False, tools)
    finished = chat(tokenizer, [*first[:shared], {"role": "assistant", "content": "|"}], False, tools)
    begin = os.path.commonprefix([prompt, finished])
    if not all(x.startswith(begin) for x in texts) or not begin.startswith(asked):
        raise ValueError("has a response that, in the chat template, does not continue the prompt")
    return begin, texts, True


def check_printed(tokenizer, messages, tools, text):
    """ValueError if text, the conversation as the template prints it, lacks a message or what came with it."""
    # a role that the template does not know, words beside a call
    marks = [f"|{n}|" if x["content"].strip() else "" for n, x in enumerate(messages)]
    marked = chat(tokenizer, [{**x, "content": mark} for x, mark in zip(messages, marks)], False, tools)
    for mark, message in zip(marks, messages):
        if mark not in marked:
            raise ValueError(f"has a text of the {message['role']} that the model's chat template does not print")
    for key in ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"):
        without = [{name: x for name, x in message.items() if name != key} for message in messages]
        if without != messages and text == chat(tokenizer, without, False, tools):
            raise ValueError(f"has {key}, of which the model's chat template prints nothing")
    if re.search(r'"arguments": "\{', text) and any("tool_calls" in x for x in messages):
        raise ValueError("has arguments of a tool call as text, which the template encodes once more: parse them")


def encode_pair(prompt, texts, tokenizer, stops):
    """(prompt, chosen, rejected) as token ids, rejected empty where there is none, of what `render` returns. Tokens are
    those of the whole text, as the model would write them, and every response ends in exactly one EOS."""
    joint = [encode_prompt(tokenizer, text) for text in texts]
    # of a text that is trained whole, the first token is the prompt
    if prompt is None:
        ids = joint[0][:1]
    else:
        ids = encode_prompt(tokenizer, prompt)
    # what all three begin with
    shared = len(os.path.commonprefix([ids, *joint]))
    responses = [x[shared:] for x in joint]
    if prompt is not None and (shared < len(ids) or min(map(len, responses)) == 0):
        # a token lies across the border: apart, if it can be behind a line's end, where no tokenizer puts a space
        line = tokenizer("\n", add_special_tokens=False)["input_ids"]
        for n, text in enumerate(texts):
            text = text[len(prompt):]
            found = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
            if found[:len(line)] == line:
                responses[n] = found[len(line):]
            else:
                responses[n] = tokenizer(text, add_special_tokens=False)["input_ids"]

    # what a text or a template has at its end: EOS, perhaps several, and space behind it
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
    return (ids, *responses, [])[:3]


def make_examples(rows, source, model, tokenizer, run):
    """([(where, prompt as text, example)], counts) of rows: an example is (prompt, chosen, rejected) as token ids. Bad
    rows are left out and counted; more of them than a share run["bad_rows"] end the program.

    As in DPO, of a pair over max_length the prompt is cut to max_prompt_length, then the ends of its responses."""
    examples, bad = [], {}
    counts = collections.Counter(read=len(rows))
    stops = stop_tokens(model, tokenizer)
    known = len(model.get_input_embeddings().weight)
    for where, row in tqdm(rows, desc="reading", leave=False, disable=None):
        try:
            prompt, texts, shortened = render(row, tokenizer, run["method"] == "sft")
            if any("\ud800" <= c <= "\udfff" for text in texts for c in text):
                raise ValueError("has half a surrogate pair, which is no text")
            ids, chosen, rejected = encode_pair(prompt, texts, tokenizer, stops)
            highest = max([*ids, *chosen, *rejected])
            if highest >= known:
                raise ValueError(f"has a token that the model does not know: {highest} of {known}")
            if chosen == rejected:
                raise ValueError("has identical responses")
            counts["shortened"] += shortened

            # too long: first the prompt gives way, but for BOS, then both responses
            if len(ids) + max(len(chosen), len(rejected)) > run["max_length"]:
                counts["truncated"] += 1
                if len(ids) > run["max_prompt_length"] and run["truncation"] == "left":
                    counts["beheaded"] += 1
                    first = opening(tokenizer) or [tokenizer.bos_token_id]
                    if ids[:len(first)] != first:
                        first = []
                    rest = max(0, run["max_prompt_length"] - len(first))
                    ids = first + ids[len(ids) - rest:]
                ids = ids[:run["max_prompt_length"]]
                room = run["max_length"] - len(ids)
                chosen, rejected = chosen[:room], rejected[:room]
            if chosen == rejected:
                raise ValueError(f"has responses that are the same within --max_length={run['max_length']}")
            examples.append((where, prompt, (ids, chosen, rejected)))
        except ValueError as error:
            reason = str(error).split(":")[0]
            bad.setdefault(reason, []).append(f"{where} {error}")

    # the commonest reasons, each with its first row
    counts["left out"] = len(rows) - len(examples)
    said = f"{source}: {counts['left out']} bad rows of {len(rows)}"
    for wheres in sorted(bad.values(), key=len, reverse=True)[:3]:
        said += f"; {len(wheres)} x {wheres[0]}"
    if counts["left out"] > run["bad_rows"] * len(rows) or not examples:
        sys.exit(f"error: {said}. --bad_rows={run['bad_rows']:g} is the share that may be left out; raise it to go on")
    if bad:
        print(said)
    return examples, counts


def hold_out(examples, eval_pairs, seed):
    """(examples to train on, held-out examples): those of a tenth of the prompts, at most eval_pairs of them. No prompt
    is in both parts, but where every prompt has more pairs than that."""
    # rows without a prompt share none
    groups = {}
    for example in examples:
        where, prompt, _ = example
        groups.setdefault(prompt or where, []).append(example)
    prompts = sorted(groups)
    if len(prompts) == 1:
        sys.exit("error: all pairs share one prompt, so none can be held out; add prompts, or name --eval_data")
    # whole groups, as long as they fit
    order = np.random.default_rng(seed).permutation(len(prompts))
    held = []
    count = max(1, min(eval_pairs, len(prompts) // 10))
    for i in order:
        pairs = groups[prompts[i]]
        if count > 0 and len(held) + len(pairs) <= eval_pairs:
            held += pairs
            count -= 1
    # no group fits
    if not held:
        held = groups[prompts[order[0]]][:eval_pairs]
        print(f"warning: each prompt has more than --eval_pairs={eval_pairs} pairs: one prompt is in both parts")
    wheres = {where for where, _, _ in held}
    return [x for x in examples if x[0] not in wheres], held


def show_examples(examples, tokenizer, count):
    """Print the first examples as the model sees them, and how long all are."""
    for where, _, (prompt, *responses) in examples[:count]:
        print(f"\n{where}\n  prompt   |" + tokenizer.decode(prompt).replace("\n", "\\n"))
        for name, response in zip(("chosen", "rejected"), filter(None, responses)):
            tokens = "".join(f"[{tokenizer.decode(token)}]" for token in response)
            print(f"  {name:8} |" + tokens.replace("\n", "\\n"))
    print("\ntokens in [] carry loss; special tokens are shown, \\n is a line's end\n")
    print("tokens    median   90 %   99 %    most")
    for n, name in enumerate(("prompt", "chosen", "rejected")):
        lengths = [len(example[n]) for _, _, example in examples]
        print("{:8} {:7.0f} {:6.0f} {:6.0f} {:7.0f}".format(name, *np.percentile(lengths, (50, 90, 99, 100))))


def fingerprint(examples, *models):
    """A short hash of examples (token ids) and of the models' weights (every thousandth)."""
    digest = hashlib.sha256(repr(examples).encode())
    for model in models:
        for p in model.parameters():
            digest.update(p.detach().flatten()[::1000].contiguous().float().cpu().numpy())
    return digest.hexdigest()[:16]


# -----------------------------------------------------------------------------
# rows: several whole pairs in one row, each with its prompt once; a row is what a forward pass takes
#
#     ids        P0 P1 P2  W0 W1 W2  L0 L1   P0 P1  W0  L0 L1   .  .      prompts P, chosen W, rejected L, padding
#     position    0  1  2   3  4  5   3  4    0  1   2   2  3   0  0      both responses continue the prompt
#     pair        0  0  0   0  0  0   0  0    1  1   1   1  1  -1 -1
#     part        0  0  0   1  1  1   2  2    0  0   1   2  2   0  0
#
# P2 predicts W0 and L0, W0 predicts W1 and so on; the last tokens, here W3 and L2, are labels alone


def size(example):
    """Tokens of an example in a row: all but the last of each response."""
    prompt, chosen, rejected = example
    return len(prompt) + max(0, len(chosen) - 1) + max(0, len(rejected) - 1)


def pack(lengths, row_length):
    """Rows (lists of indices) whose lengths sum to at most row_length: first fit, longest first."""
    # free: places left in each row
    rows, free = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [r for r, space in enumerate(free) if space >= lengths[i]]
        if not fitting:
            fitting = [len(rows)]
            rows.append([])
            free.append(row_length)
        rows[fitting[0]].append(i)
        free[fitting[0]] -= lengths[i]
    return rows


def collate(examples, length=0, device="cpu", attention="pairs"):
    """A row of whole pairs, padded to length, on the device: ids and position (1, L); for the N response tokens source
    (index of the token that predicts it), labels and, on the CPU, pair and chosen; attention: the model's arguments."""
    ids, position, row_pair, part = [], [], [], []
    source, labels, pair, chosen = [], [], [], []
    for n, (prompt, *responses) in enumerate(examples):
        # the prompt, once
        ids += prompt
        position += range(len(prompt))
        row_pair += [n] * size(examples[n])
        part += [0] * len(prompt)
        last = len(ids) - 1

        # its responses; SFT has no rejected one
        for k, response in enumerate(responses, 1):
            if not response:
                continue
            source += [last, *range(len(ids), len(ids) + len(response) - 1)]
            labels += response
            pair += [n] * len(response)
            chosen += [k == 1] * len(response)
            ids += response[:-1]
            position += range(len(prompt), len(prompt) + len(response) - 1)
            part += [k] * (len(response) - 1)
    padding = max(0, length - len(ids))
    ids += [0] * padding
    position += [0] * padding
    row_pair += [-1] * padding
    part += [0] * padding

    # pinned, or the copy may wait for what the device is doing
    pin = torch.device(device).type == "cuda"
    columns = []
    for x in (ids, position, row_pair, part, source, labels):
        columns.append(torch.tensor(x, pin_memory=pin).to(device, non_blocking=pin))
    ids, position, row_pair, part, source, labels = columns
    arguments = attention_arguments(row_pair, part, [size(example) for example in examples], attention)
    return dict(ids=ids[None], position=position[None], source=source, labels=labels, pair=torch.tensor(pair),
                chosen=torch.tensor(chosen), attention=arguments)


def sees(q, k, pair, part):
    """Whether the token at q attends to the one at k, both indices of a row: to itself and to what is before it in its
    own pair, the prompt (part 0) and its own response (1 chosen, 2 rejected)."""
    return (k <= q) & (pair[k] == pair[q]) & ((part[k] == 0) | (part[k] == part[q]))


def additive_mask(pair, part):
    """`sees` as (L, L) floats to be added to attention scores: 0 where visible, the lowest number elsewhere."""
    token = torch.arange(len(pair), device=pair.device)
    hidden = ~sees(token[:, None], token, pair, part)
    mask = torch.zeros(hidden.shape, device=pair.device)
    return mask.masked_fill(hidden, torch.finfo(torch.float32).min)


def attention_arguments(pair, part, sizes, how):
    """What a model takes in place of a padding mask: FlexAttention's block mask (flex), a mask for each pair (pairs),
    or one for the row (mask), for models that take no registered attention function."""
    if how == "mask":
        return {"attention_mask": additive_mask(pair, part)[None, None]}
    if how == "flex":
        def mask(b, h, q, k):
            return sees(q, k, pair, part)
        layout = create_block_mask(mask, None, None, len(pair), len(pair), device=pair.device)
    else:
        masks = [additive_mask(*x) for x in zip(pair.split(sizes), part.split(sizes))]
        layout = sizes, masks, {}
    # with a mask at hand, if only of one element, the model makes none of its own
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=pair.device), "layout": layout}


def pair_attention(module, query, key, value, attention_mask, layout=None, scaling=None, **options):
    """Attention for rows of pairs in any model that takes a registered function: (1, heads, L, D) -> (1, L, heads, D).

    On a GPU FlexAttention skips the blocks that the mask leaves out. Elsewhere each pair attends by itself in plain
    products, a fraction of the time of torch's flash kernel on the whole row. Without packed rows it is sdpa.
    """
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError("its attention has softcapping or sinks, which only its own implementation computes")
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    # rotary embeddings leave them in fp32 under autocast
    query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(layout, BlockMask):
        return flex_attention_forward(module, query, key, value, layout, scaling=scaling, **options)

    # the heads that share a key and value lie one under another; the first layer makes their masks
    sizes, masks, ready = layout
    heads, groups = query.shape[1], key.shape[1]
    width = query.shape[-1]
    kind = value.dtype, heads // groups
    if kind not in ready:
        ready[kind] = [mask.to(value.dtype).repeat(heads // groups, 1) for mask in masks]
    out = []
    queries, keys, values = (x[0].split(sizes, 1) for x in (query, key, value))
    for q, k, v, mask in zip(queries, keys, values, ready[kind]):
        scores = torch.baddbmm(mask, q.reshape(groups, -1, width), k.mT, alpha=scaling or width**-0.5)
        attended = scores.softmax(-1) @ v
        out.append(attended.view(heads, -1, v.shape[-1]).transpose(0, 1))
    return torch.cat(out)[None], None


class Adapter(torch.nn.Module):
    """A linear layer's weight W as W + 32/rank B A, of which B and A are trained (LoRA: Hu et al., arXiv:2106.09685;
    the factor makes the learning rate independent of the rank). B is 0 at first. Of rank 0 it is W alone, kept in bf16.

    Autocast takes a bf16 weight as it is and rounds the sum, as it does every weight; elsewhere both are fp32."""
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
    """Its transformer blocks, by transformers' own list of modules that stay in one piece."""
    return [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]


def linear_layers(model):
    """The linear layers of its blocks."""
    return [m for block in blocks_of(model) for m in block.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]


def checkpoint_blocks(model):
    """Keep no block's activations for the backward pass, but compute them again. transformers' own switch works in
    training mode alone, in which some blocks drop out."""
    for block in blocks_of(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def adapt(model, rank, low):
    """Freeze a model and put adapters on its blocks' linear layers; of rank 0 they train nothing. low: the weights of
    these layers become bf16, below adapters always, else where that loses nothing. Embeddings and norms stay in fp32:
    autocast does not round them either, so its results are the same to the bit."""
    layers = linear_layers(model)
    model.requires_grad_(False)
    for layer in layers:
        rounded = layer.weight.detach().bfloat16()
        keep = low and (rank > 0 or bool((rounded == layer.weight).all()))
        if keep:
            layer.weight = torch.nn.Parameter(rounded, requires_grad=False)
        if keep or rank:
            parametrize.register_parametrization(layer, "weight", Adapter(layer.weight, rank), unsafe=True)
    if rank and not layers:
        sys.exit(f"error: --lora_rank={rank}: {type(model).__name__} has no blocks with linear layers; leave it out")


AttentionInterface.register("pair_attention", pair_attention)
AttentionMaskInterface.register("pair_attention", sdpa_mask)


def response_states(body, model, batch):
    """Hidden states (N, d) that predict the response tokens, and a column of ones where the output layer has a bias."""
    out = body(input_ids=batch["ids"], position_ids=batch["position"], use_cache=False, **batch["attention"])
    hidden = out.last_hidden_state[0][batch["source"]]
    if getattr(model.get_output_embeddings(), "bias", None) is None:
        return hidden
    return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)


def output_weight(model):
    """The output layer (V, d), its bias as one more column."""
    layer = model.get_output_embeddings()
    if getattr(layer, "bias", None) is None:
        return layer.weight
    return torch.cat([layer.weight, layer.bias[:, None]], 1)


@torch.no_grad()
def packing_error(model, examples, attention):
    """What is wrong with rows of this model; "" where every response token gets the logits of its own sequence alone.

    What a configuration tells is read there, as its effect on these examples may be small; the comparison catches what
    nobody knows of: attention that ignores a mask, recurrent layers.
    """
    config = model.config.get_text_config()
    longest = max(len(prompt) + max(map(len, responses)) - 1 for prompt, *responses in examples)
    mixing = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv1d)]
    mixing += [x for x in getattr(config, "layer_types", None) or () if re.search("linear|mamba|recurrent|conv", x)]
    if mixing:
        return f"it has recurrent or convolutional layers ({mixing[0]}), which mix the sequences of a row"
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1):
            return f"its {name} of {getattr(config, name)} changes logits behind the output layer"
    for name in ("sliding_window", "attention_chunk_size"):
        if (getattr(config, name, None) or longest) < longest:
            return f"its {name} of {getattr(config, name)} tokens is shorter than a prompt and response of {longest}"

    # one row, and every sequence by itself
    length = 0
    if attention == "flex":
        length = math.ceil(sum(map(size, examples)) / 128) * 128
    try:
        batch = collate(examples, length, model.device, attention)
        packed = response_states(model.base_model, model, batch).float() @ output_weight(model).T.float()
        alone = []
        for prompt, *responses in examples:
            for response in filter(None, responses):
                ids = torch.tensor([prompt + response[:-1]], device=model.device)
                alone.append(model(ids, use_cache=False).logits[0, len(prompt) - 1:].float())
        alone = torch.cat(alone)
        gap = (packed - alone).abs().amax(1) / alone.std(1).clamp(min=1e-6)
        gap = gap.max()
    except Exception as error:      # models raise what they like at arguments that they do not know
        return str(error).split("\n")[0]
    if not gap < 1e-3:
        return f"packed rows give other logits than separate sequences (off by {gap:.1g} standard deviations)"
    return ""


def choose_attention(models, examples, preferred):
    """The preferred form of attention, or an additive mask where a model, {name: model}, takes no registered function.
    Ends the program where neither is exact."""
    for model in models.values():
        model.set_attn_implementation("pair_attention")
    for how in (preferred, "mask"):
        errors = {name: packing_error(model, examples, how) for name, model in models.items()}
        errors = {name: error for name, error in errors.items() if error}
        if not errors:
            return how
    name, error = errors.popitem()
    sys.exit(f"error: {name} ({type(models[name]).__name__}) cannot be trained exactly here: {error}. Scaled or "
             "softcapped logits, recurrent layers and windows shorter than max_length are not supported")


# -----------------------------------------------------------------------------
# processes, checkpoint, log

# the same for any number of processes
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
CHECKPOINT = ("state.pt", "config.json", "generation_config.json", "model*.safetensors*", "tokenizer*", "vocab.*",
              "merges.txt", "special_tokens_map.json", "added_tokens.json", "*chat_template*", "samples.jsonl",
              "prompts.jsonl", "evals", "log.png")


def join_processes():
    """(rank, number of processes) under torchrun, else (0, 1). Rank 0 alone prints and writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # rank 0 may sample pairs for hours
    dist.init_process_group(timeout=datetime.timedelta(days=1))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), dist.get_world_size()


def total(x):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def shard(model, device, compiled, low):
    """Spread a model over all processes, block by block (FSDP2), each block compiled where asked; low: blocks gather
    weights in bf16, the rest (embeddings, output layer) in fp32, and all sum gradients in fp32."""
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


def save(folder, model, tokenizer, optimizer, step, **origin):
    """Write state.pt, which alone is the checkpoint (origin: what else is in it), and the Hugging Face files, for
    everybody else. They are written beside the old ones, then moved, state.pt first and at one stroke. All processes
    call it, rank 0 writes."""
    weights, state = get_state_dict(model, optimizer, options=FULL)
    if dist.is_initialized() and dist.get_rank():
        return
    # adapters alone are a checkpoint, and everybody else gets W + BA
    merged = {name: x for name, x in weights.items() if ".parametrizations." not in name}
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            merged[name + ".weight"] = layer.weight.detach().cpu()
    if len(merged) < len(weights):
        weights = {name: x for name, x in weights.items() if name.endswith((".0.A", ".0.B"))}
    # gathered apart, but one tensor in the file
    for name, source in model.all_tied_weights_keys.items():
        merged[name] = merged[source]
    new = os.path.join(folder, ".saving")
    try:
        shutil.rmtree(new, ignore_errors=True)
        os.makedirs(new)
        state = dict(origin, step=step, weights=weights, optimizer=state)
        torch.save(state, os.path.join(new, "state.pt"))
        model.save_pretrained(new, state_dict=merged)
        tokenizer.save_pretrained(new)
        for path in glob.glob(glob.escape(new) + "/**", recursive=True):
            # on the disk, should the machine fail
            if os.path.isfile(path):
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
    except Exception as error:              # no space left, above all: safetensors and torch raise their own kinds
        shutil.rmtree(new, ignore_errors=True)
        sys.exit(f"error: step {step} could not be saved in {folder}: {error}. What was saved there before is whole: "
                 "make room, and continue with --resume=True")
    names = os.listdir(new)
    names.remove("state.pt")
    for name in ["state.pt", *names]:
        target = os.path.join(folder, name)
        if os.path.isdir(target):
            shutil.rmtree(target)
        os.replace(os.path.join(new, name), target)
    os.rmdir(new)


def load_state(folder):
    """{"step", "fingerprint", "started", "weights", "optimizer"} of a folder's checkpoint. Ends the program without."""
    try:
        state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("step", "fingerprint", "started", "weights", "optimizer")}
    except Exception as error:      # missing, cut short, or no state at all: the unpickler raises what it likes
        sys.exit(f"error: {folder} has no complete checkpoint ({type(error).__name__} in state.pt); start again with "
                 "--overwrite=True")


def start_log(folder, options, step, resume):
    """The open log of a run, its options.json and its objective, a copy of tdpo.py. A resumed log keeps its lines up to
    the step; a new run removes the checkpoint of the one that it replaces, so none ever lies beside another's log."""
    log = ""
    if resume:
        for record in eval_imdb.read_log(folder, step):
            log += json.dumps(record) + "\n"
    else:
        for pattern in CHECKPOINT:
            for path in glob.glob(os.path.join(glob.escape(folder), pattern)):
                if os.path.isdir(path):
                    shutil.rmtree(path)
                else:
                    os.remove(path)
    with open(os.path.join(os.path.dirname(__file__), "tdpo.py"), encoding="utf-8") as f:
        objective = f.read()
    # a kill leaves the old ones or the new ones, never a part
    for name, text in (("tdpo.py", objective), ("options.json", json.dumps(options, indent=1)), ("log.jsonl", log)):
        path = os.path.join(folder, name)
        with open(path + ".new", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(path + ".new", path)
    return open(path, "a", encoding="utf-8", buffering=1)


PANELS = {
    "reward of fresh samples": ["eval_reward"],
    "KL(π_ref ‖ π), nats": ["kl_w", "kl_l", "eval_kl_w", "eval_kl_l", "eval_sample_kl"],
    "KL(π ‖ π_ref), nats": ["rkl_w", "rkl_l", "eval_rkl_w", "eval_rkl_l", "eval_sample_rkl"],
    "loss": ["loss", "eval_loss"],
    "accuracy": ["acc", "eval_acc"],
}


def draw_log(folder):
    """log.png: what a run has logged, over its steps, as far as it has it. It takes matplotlib."""
    import matplotlib
    matplotlib.use("Agg")                   # to a file, no window
    import matplotlib.pyplot as plt
    log = eval_imdb.read_log(folder)
    titles = [title for title, names in PANELS.items() if any(name in record for record in log for name in names)]
    figure, axes = plt.subplots(1, len(titles), figsize=(4.5 * len(titles), 3.6), squeeze=False, layout="constrained")
    for axis, title in zip(axes[0], titles):
        for name in PANELS[title]:
            points = [(record["step"], record[name]) for record in log if name in record]
            if points:
                steps, values = zip(*points)
                axis.plot(steps, values, marker="." if "eval" in name else "", label=name)
        axis.set(title=title, xlabel="step")
        axis.legend()
    figure.savefig(os.path.join(folder, "log.png"), dpi=100)
    plt.close(figure)


# -----------------------------------------------------------------------------
# steps, metrics


@functools.lru_cache(2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def step_indices(step, batch_size, n, seed):
    """The pairs of a step: the next batch_size of an endless stream of permutations of n, each from (seed, epoch)."""
    indices = []
    for k in range(step * batch_size, (step + 1) * batch_size):
        indices.append(int(permutation(n, seed, k // n)[k % n]))
    return indices


def preference_metrics(stats):
    """What the log holds means of, a dict of (P,) tensors; stats as from tdpo_loss. acc compares log-ratios, the same
    for every method; acc_loss is the method's own, margin > 0; the gaps are absolute differences."""
    metrics = dict(stats)
    metrics["acc"] = stats["logratio_w"] > stats["logratio_l"]
    metrics["acc_loss"] = stats["margin"] > 0
    metrics["kl_gap"] = (stats["kl_l"] - stats["kl_w"]).abs()
    metrics["rkl_gap"] = (stats["rkl_l"] - stats["rkl_w"]).abs()
    return metrics


def memory_needs(model, ref, examples, attention, low, adamw, checkpointed, world=1):
    """(bytes that a training step will take in one of world processes, {what: bytes}), before it takes them.

    examples: a row's. ref: None for SFT. low: under bf16 autocast. Activations are what a forward pass keeps for its
    backward: it is run on tensors without data."""
    owned = {id(p) for p in model.parameters()}
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    output = model.get_output_embeddings().weight
    rank = max([m.rank for m in model.modules() if isinstance(m, Adapter)], default=0)

    with FakeTensorMode():
        twin = type(model)(model.config).eval()
        twin.set_attn_implementation("pair_attention")
        if rank:
            adapt(twin, rank, low)
        params = {p.untyped_storage()._cdata for p in twin.parameters()}
        kept = {}

        def keep(x):
            if x.untyped_storage()._cdata not in params:
                kept[x.untyped_storage()._cdata] = x.untyped_storage()
            return x
        # it logs what it cannot run, which is no news to anybody
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
        for how in (attention, "mask"):
            batch = collate(examples, attention=how.replace("flex", "mask"))
            # FlexAttention keeps what attention without a mask does
            if how == "flex":
                batch["attention"] = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
            try:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                    with torch.autocast("cpu", torch.bfloat16, enabled=low):
                        response_states(twin.base_model, twin, batch)
                break
            except Exception:       # no registered function is taken; or which experts a token takes is in the data
                kept.clear()
        # on a CPU a large buffer takes whole huge pages (THP_MEM_ALLOC_ENABLE, above)
        page = 1 if attention == "flex" else 2**21
        activations = 0
        for x in kept.values():
            n = x.nbytes()
            activations += math.ceil(n / page) * page if n >= page else n
    # the inputs of all blocks, and one block at a time; but autocast keeps its bf16 copies of all trained weights,
    # where FSDP does not gather them in bf16 block by block
    if checkpointed and kept:
        blocks = len(blocks_of(model))
        copies = 0
        if low and not rank and world == 1:
            copies = 2 * sum(layer.weight.numel() for layer in linear_layers(model))
        activations = max((activations - copies) / blocks, 0) + copies
        activations += blocks * 4 * batch["ids"].numel() * output.shape[1]

    # FSDP spreads the blocks; what is in none stays gathered once it was, as the loss takes the output layer
    needs = {"weights": 0, "gradients": trained / world, "optimizer": trained * (2 if adamw else 1) / world,
             "reference": 0, "activations": activations}
    for name, m in (("weights", model), ("reference", ref)):
        if m is None:
            continue
        inside = {id(p) for block in blocks_of(m) for p in block.parameters()}
        for p in m.parameters():
            if name == "weights" or id(p) not in owned:
                needs[name] += p.nbytes / (world if id(p) in inside else 1)
    # three logits of a chunk of tokens; the output layer's gradient and a chunk's part of it; in bf16 the layers
    rows = CHUNK_ROWS if attention == "flex" else CHUNK_ROWS // 8
    needs["loss"] = 3 * 4 * min(rows, len(batch["labels"])) * len(output) + 8 * output.numel() * output.requires_grad
    needs["loss"] += 4 * output.numel() * low
    # this stays; the rest comes and goes, in a pass or in the optimizer's step
    stays = needs["weights"] + needs["gradients"] + needs["optimizer"] + needs["reference"]
    return stays + max(needs["activations"] + needs["loss"], trained / world), needs


def too_large(needed, there, run, most):
    """What to say where a step that takes so many bytes cannot fit the GPU, or "": a sentence with the options that
    would help. most: tokens of the largest pair, which a pass takes at least."""
    # on CPUs the estimate was within 15 % of what was measured
    if 0.85 * needed <= there:
        return ""
    helps = []
    if not run["checkpoint_activations"]:
        helps.append("--checkpoint_activations=True")
    if run["micro_tokens"] > most:
        helps.append("a smaller --micro_tokens")
    if not run["lora_rank"]:
        helps += ["--lora_rank=16", "more processes"]
    return (f"a step takes about {needed / 2**30:.1f} GiB, and the GPU has {there / 2**30:.1f}; what takes less: "
            + ", ".join(helps + ["a smaller model"]))


def peak_gib(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    # ru_maxrss is in bytes on macOS, in KiB on Linux
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    # -------------------------------------------------------------------------
    # options, processes, device
    launched = time.time()
    options = configure(sys.argv[1:])
    # from here on the globals above are this run's
    globals().update(options)
    rank, world = join_processes()
    # the same in all processes
    started = total(torch.tensor(launched if rank == 0 else 0, dtype=torch.float64)).item()
    if rank == 0:
        # one run a directory: the lock lasts as long as this process, however it ends
        try:
            os.makedirs(out_dir, exist_ok=True)
            lock = open(os.path.join(out_dir, ".lock"), "w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"error: --out_dir={out_dir}: another run is at work in it; name another directory, or wait")
        except (OSError, ValueError) as error:
            sys.exit(f"error: --out_dir={out_dir}: {error}; name a directory that can be written")
    sft, task = method == "sft", data in eval_imdb.TASKS
    if lora_rank and world > 1:
        sys.exit("error: --lora_rank works in one process: FSDP would spread the weights that adapters and reference "
                 "share. Start it without torchrun, or leave --lora_rank out")
    if device == "auto":
        device = DEVICES[0]
    if device not in DEVICES:
        sys.exit(f"error: --device={device}: torch {torch.__version__} sees none here; --device=cpu works anywhere")
    if dtype == "auto":
        dtype = options["dtype"] = "bfloat16" if device == "cuda" else "float32"
    compiled = compile == "True" or compile == "auto" and device == "cuda"

    # -------------------------------------------------------------------------
    # policy, reference, data, and first what can be wrong with a task's texts and reward. Rank 0 goes ahead and makes
    # the files that the other processes then find
    if rank:
        dist.barrier()
    if task:
        reviews = eval_imdb.load_texts(data, texts)
    if task and not sft:
        score = eval_imdb.load_reward(reward, device)

    # a GPU may be too small for a whole model, so that it waits on the CPU until that is known; a task samples first
    place = device if task else "cpu"
    if init_from == "scratch":
        model, tokenizer = eval_imdb.scratch_model(seed)
    else:
        model, tokenizer = load_model(init_from, place)
    positions = getattr(model.config, "max_position_embeddings", None) or max_length
    if max_length > positions:
        sys.exit(f"error: --max_length={max_length} is more than the {positions} positions of {init_from}; lower it")
    if tokenizer.eos_token_id is None:
        sys.exit(f"error: the tokenizer of {init_from} has no EOS token, which ends every response; set its eos_token")
    if ref_from:
        ref = load_reference(ref_from, model, tokenizer)

    # the embedded task's SFT model, trained with this same file and given its name when it is done
    if init_from == "scratch" and not sft:
        init_from = options["init_from"] = os.path.join(os.path.dirname(out_dir), f"reviews-sft-{seed}")
        if not os.path.exists(init_from):
            command = ["--method=sft", f"--seed={seed}", f"--device={device}", f"--out_dir={init_from}-new",
                       "--overwrite=True"]
            print("the SFT model first: python train.py " + " ".join(command), flush=True)
            # and so ends that run, too
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            try:
                done = subprocess.run([sys.executable, __file__, *command], env={**os.environ, "WORLD_SIZE": "1"})
            except KeyboardInterrupt:
                sys.exit(128 + signal.SIGINT)
            if done.returncode:
                sys.exit("error: the SFT run failed; if another run is at work in it, wait for that")
            os.rename(init_from + "-new", init_from)
        model, tokenizer = load_model(init_from, place)
    models = {init_from: model}
    if not sft:
        if not ref_from:
            ref = model
            if not lora_rank:
                ref = load_reference(init_from, model, tokenizer)
        models[ref_from or "the reference"] = ref

    # a chat template that prints the date prints that of the run's first start
    if resume:
        state = load_state(out_dir)
        started = state["started"]

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(started, tz)
    chat_template_utils.datetime = Clock

    # the rows: a task's own, or a source's
    source, held_source = data, eval_data
    if data == "hh":
        source = "Anthropic/hh-rlhf"
    if eval_split or data == "hh":
        held_source = held_source or source
    if task and sft:
        rows = [(f"text {n}", {"text": text}) for n, text in enumerate(reviews["train"], 1)]
        held_rows = [(f"test text {n}", {"text": text}) for n, text in enumerate(reviews["test"][:eval_pairs], 1)]
    else:
        if task:
            prefixes = eval_imdb.task_prefixes(reviews, tokenizer, seed, train_prefixes, eval_prefixes)
            source = eval_imdb.build_pairs(options, model, tokenizer, prefixes["train"], score)
        rows, held_rows = read_rows(source, data_split, data_config), []
        if held_source:
            held_rows = read_rows(held_source, eval_split, data_config, default="test")

    # from rows to tokens; what is held out is of other prompts
    found, counts = make_examples(rows, source, model, tokenizer, options)
    if held_rows:
        held, held_counts = make_examples(held_rows, held_source or source, model, tokenizer, options)
        order = np.random.default_rng(seed).permutation(len(held))
        held = [held[i] for i in order[:eval_pairs]]
        beyond = held_counts["read"] - held_counts["left out"] - len(held)
        print(f"held out: {held_counts['read']} read = {len(held)} evaluated + {beyond} beyond --eval_pairs + "
              f"{held_counts['left out']} left out")
    else:
        found, held = hold_out(found, eval_pairs, seed)
        counts["held out"] = len(held)
    names = [where for where, _, _ in found]
    prompts = [prompt for _, prompt, _ in held if prompt is not None]
    if task and not sft:
        prompts = prefixes["test"]
    examples, held_out = [example for _, _, example in found], [example for _, _, example in held]
    noun = "texts" if sft else "pairs"
    print(f"{noun}: {counts['read']} read = {len(examples)} to train on + {counts['held out']} held out + "
          f"{counts['left out']} left out; {counts['truncated']} truncated, {counts['beheaded']} prompts without their "
          "beginning")
    if counts["shortened"]:
        print(f"note: {counts['shortened']} prompts end before the chat template's generation prompt does, as finished "
              "turns do not repeat it (nor, perhaps, reasoning); --show_data shows what is left")
    if show_data:
        show_examples(found, tokenizer, show_data)
        sys.exit()

    # adapters on the policy; and weights that autocast rounds anyway need no more than bf16
    if lora_rank:
        torch.manual_seed(seed)
        # transformers keeps experts as one tensor
        inside = sum(p.numel() for block in blocks_of(model) for p in block.parameters())
        reached = sum(layer.weight.numel() for layer in linear_layers(model))
        if reached < 0.5 * inside:
            print(f"note: adapters reach {reached / inside:.0%} of the blocks' weights; the others, say experts, are "
                  "no linear layers: they stay as they are, in fp32")
        adapt(model, lora_rank, dtype == "bfloat16")
    if not sft and lora_rank and not ref_from:
        # the same model and weights, its adapters off
        ref = models["the reference"] = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        for m in ref.modules():
            if isinstance(m, Adapter):
                m.rank = 0
    elif not sft and dtype == "bfloat16":
        adapt(ref, 0, low=True)

    if checkpoint_activations and not blocks_of(model):
        sys.exit(f"error: --checkpoint_activations=True: {type(model).__name__} names no blocks; leave it out")

    # does it fit, the fullest row of the longest examples?
    sizes = [size(example) for example in examples]
    most = max(sizes + [size(example) for example in held_out])
    micro_tokens = max(micro_tokens or (8192 if device == "cuda" else 1024), most)
    attention = "pairs"
    if device == "cuda":
        attention = "flex"
    elif compiled:                                      # rows of one length, so that the model compiles once
        attention = "mask"
    row = sorted(examples, key=size)[-batch_size:]
    row = [row[i] for i in pack([size(example) for example in row], micro_tokens)[0]]
    needed, needs = memory_needs(model, None if sft else ref, row, attention, dtype == "bfloat16",
                                 optimizer == "adamw", checkpoint_activations, world)
    shares = ", ".join(f"{name} {x / 2**30:.2f}" for name, x in needs.items())
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        message = too_large(needed, there, {**options, "micro_tokens": micro_tokens}, most)
        if message:
            sys.exit(f"error: {message} ({shares})")

    if world == 1:
        place = device
        for m in models.values():
            m.to(device)
    if checkpoint_activations:
        checkpoint_blocks(model)

    # are packed rows exact for these models? On the first example beside the longest sequence, and beside the pair that
    # takes most of a row: GPT-Neo's local attention counts places in a row
    longest = max(examples + held_out, key=lambda e: len(e[0]) + max(len(e[1]), len(e[2])))
    largest = max(examples + held_out, key=size)
    if attention == "flex" and place == "cpu":          # for that FlexAttention wants a GPU
        attention = "pairs"
    for probe in (longest, largest):
        attention = choose_attention(models, [examples[0], probe], attention)
    if device == "cuda" and attention == "pairs":       # it was looked at on the CPU
        attention = "flex"

    if device != "cuda":
        # the process has these already, whole, and libraries and what came before besides
        here = {id(p): p.nbytes for m in models.values() for p in m.parameters()}
        needed += peak_gib("cpu") * 2**30 - sum(here.values())
    print(f"memory: about {needed / 2**30:.2f} of {there / 2**30:.1f} GiB ({shares})", flush=True)
    if not needs["activations"]:
        print("note: that is without activations, which this model's layers do not tell before they have data")

    # a resumed run has to find the same data and reference again, and what its adapters were put on, if that is another
    stands_on = [model] if sft else [ref]
    if lora_rank and ref_from:
        stands_on.append(model)
    digest, step = fingerprint([*examples, *held_out], *stands_on), 0
    origin = {"fingerprint": digest, "started": started}
    if resume:
        step = state["step"]
        if state["fingerprint"] != digest:
            sys.exit(f"error: the data or the model that the run in {out_dir} began with is another now; give back "
                     "what it was, or start another --out_dir")
        # of a model with adapters it holds these alone
        weights = state["weights"]
        if lora_rank:
            frozen = {name: x for name, x in model.state_dict().items() if not name.endswith((".0.A", ".0.B"))}
            weights = {**frozen, **weights}
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            said = " ".join(str(error).split())[:300]
            sys.exit(f"error: the checkpoint in {out_dir} is of another model: {said}")
    if world > 1 and rank == 0:
        dist.barrier()

    # -------------------------------------------------------------------------
    # rows: pairs take rows of any length, else a step's tokens make rows of one length
    row_length = 0
    if attention != "pairs":
        tokens = batch_size * sum(sizes) / len(sizes)
        per_step = world * math.ceil(tokens / micro_tokens / world)
        row_length = math.ceil(max(most, tokens / per_step) / 128) * 128
        if attention == "mask":         # such models may have a mask of their own, of as many places as positions
            row_length = max(most, min(row_length, positions))
        micro_tokens = row_length

    # states: the hidden states of a row; one call of it gathers what FSDP has spread
    vocabulary, width = model.get_output_embeddings().weight.shape
    # rows that only the policy or the reference has are padding
    common = min(len(m.get_output_embeddings().weight) for m in models.values())
    n_params = sum(p.numel() for p in model.parameters())
    n_body = n_params - vocabulary * width
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        n_body -= vocabulary * width
    for m in models.values():
        # several processes compile block by block
        if world > 1:
            shard(m, device, compiled, dtype == "bfloat16")
        body = torch.compile(m.base_model, dynamic=False) if compiled and world == 1 else m.base_model
        m.states = functools.partial(response_states, body, m)
        register_fsdp_forward_method(m, "states")

    # optimizer
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "rmsprop":
        opt = torch.optim.RMSprop(trained, lr=learning_rate)
    else:
        opt = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    max_steps = max_steps or math.ceil(len(examples) / batch_size)
    if resume:
        try:
            set_optimizer_state_dict(model, opt, state["optimizer"], options=FULL)
        except Exception as error:
            sys.exit(f"error: the checkpoint in {out_dir} is damaged ({error}); start again with --overwrite=True")
    if step >= max_steps:
        # a kill may have come before its last files
        save(out_dir, model, tokenizer, opt, step, **origin)
        sys.exit(f"error: {out_dir} is at step {step} already; --max_steps={step + max(1, step)} would continue it")

    # -------------------------------------------------------------------------
    # what will happen
    shared = 0 if sft else sum(len(prompt) for prompt, _, _ in examples)
    print(f"rows: up to {micro_tokens} tokens, {'padded' if row_length else 'without padding'}, attention {attention}; "
          f"shared prompts save {shared} of {sum(sizes) + shared} tokens")
    if batch_size > len(examples):
        print(f"warning: --batch_size={batch_size} is more than the {len(examples)} {noun}: a step takes some twice")
    if warmup_steps > max_steps:
        print(f"warning: --warmup_steps={warmup_steps} is more than the {max_steps} steps: the learning rate gets no "
              f"higher than {learning_rate * max_steps / warmup_steps:.2g} of {learning_rate:g}")
    if getattr(model.config.get_text_config(), "router_aux_loss_coef", None):
        print("note: the loss that balances this model's experts (router_aux_loss_coef) is not part of the objective")
    print(f"step: {batch_size} {noun}, about {batch_size * sum(sizes) // len(sizes)} tokens; {max_steps} steps, "
          f"{max_steps * batch_size / len(examples):.1f} epochs")
    n_trained = sum(p.numel() for p in trained)
    reference = ref_from or ("its weights without adapters" if lora_rank else "a frozen copy")
    if sft:
        reference = "none"
    print(f"policy: {init_from}, {n_params / 1e6:.1f}M parameters, {n_trained / 1e6:.1f}M of them trained, vocabulary "
          f"{vocabulary}; reference: {reference}")
    print(f"run: {method}, alpha {alpha}, beta {beta}, learning rate {learning_rate:g}, seed {seed}, device {device}, "
          f"{world} processes, dtype {dtype}, compiled {compiled}, torch {torch.__version__}; into {out_dir}",
          flush=True)
    log = open(os.devnull, "w")
    if rank == 0:
        log = start_log(out_dir, options, step, resume)
    if rank == 0 and prompts:
        # for sample.py
        with open(os.path.join(out_dir, "prompts.jsonl"), "w", encoding="utf-8") as f:
            for prompt in dict.fromkeys(prompts):
                f.write(json.dumps({"prompt": prompt}) + "\n")
    if rank == 0 and wandb_log:
        import wandb
        wandb.init(project="tdpo", name=os.path.basename(out_dir), config=options, dir=out_dir)

    # -------------------------------------------------------------------------
    # one pass over a row, for training and for evaluation
    def rows_of(examples):
        """This process's rows of a step: (batch, whether it counts). Processes meet in every pass, so they have equally
        many: one that would have fewer repeats a row, which does not count."""
        rows = pack([size(example) for example in examples], micro_tokens)
        for k in range(rank, math.ceil(len(rows) / world) * world, world):
            row = [examples[i] for i in rows[min(k, len(rows) - 1)]]
            yield collate(row, row_length, device, attention), k < len(rows)

    def forward(batch, counts):
        """The loss, a sum over the row's pairs (sft: tokens), and stats, a value for each; 0 and none if not counts."""
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            hidden = model.states(batch)
            if sft:
                loss, stats = fused_sft_loss(hidden, output_weight(model), batch["labels"])
            else:
                with torch.no_grad():
                    ref_hidden = ref.states(batch)
                loss, stats = fused_tdpo_loss(hidden, output_weight(model)[:common], ref_hidden,
                                              output_weight(ref)[:common], batch["labels"], batch["pair"],
                                              batch["chosen"], beta, alpha, method)
        n = len(stats["loss"]) if counts else 0
        return loss * n, {name: x[:n] for name, x in stats.items()}

    def means(stats, n):
        """Metrics over n pairs, of which this process has some, in several passes."""
        columns = {name: torch.cat([s[name] for s in stats]) for name in stats[0]}
        if not sft:
            columns = preference_metrics(columns)
        # one sum over processes for all of them
        sums = torch.stack([x.float().sum() for x in columns.values()])
        return dict(zip(columns, total(sums) / n))

    def write(kind, record, shown):
        """One JSON line in the log, and the columns that a person watches on the screen."""
        log.write(json.dumps(record) + "\n")
        if rank == 0 and wandb_log:
            wandb.log(record, step=step)
        columns = [f"{name.removeprefix('eval_')} {record[name]:>8.4g}" for name in shown if name in record]
        if columns:
            print(f"{kind} {step:>{len(str(max_steps))}} | " + " | ".join(columns), flush=True)

    @contextlib.contextmanager
    def sampling():
        """Uncompiled, as torch.compile would compile anew for every length of a prompt; and in bf16 where FSDP gathers
        blocks so, which then take no fp32 states."""
        low = torch.autocast(device, torch.bfloat16, enabled=world > 1 and dtype == "bfloat16")
        with torch.compiler.set_stance("force_eager"), low:
            yield

    @torch.no_grad()
    def evaluate(quick=False):
        """Log the metrics on what is held out and, in a task, the scores of fresh samples. The program ends where the
        weights are broken; quick looks for that alone, on one example."""
        some = held_out[:1] if quick else held_out
        rows = tqdm(rows_of(some), desc="evaluating", leave=False, disable=None)
        stats = [forward(batch, counts)[1] for batch, counts in rows]
        count = len(some)
        if sft:
            count = sum(len(chosen) for _, chosen, _ in some)
        found = means(stats, count)
        found = {name: x.item() for name, x in found.items()}

        # nothing broken is saved
        if not math.isfinite(found["loss"]):
            sys.exit(f"error: the held-out loss after step {step} is {found['loss']}, so this step is not saved. "
                     "Lower --learning_rate")
        if quick:
            return
        # log 2 and no KL at the start, or something is not as it seems
        if step == 0 and not sft and found["kl_l"] > 1e-5:
            print(f"warning: before the first step the KL from {ref_from or 'the reference'} is {found['kl_l']:.2g} "
                  "nats, not 0: its weights differ, or their dtype")

        # a task's own measure
        if task and not sft:
            with sampling():
                scores, samples = eval_imdb.score_policy(model, ref, tokenizer, prefixes["test"], score,
                                                         max_new_tokens, seed)
            found.update(scores)
            # runs of one seed have the same prefixes, so that they can be compared one by one
            if rank == 0:
                os.makedirs(os.path.join(out_dir, "evals"), exist_ok=True)
                with open(os.path.join(out_dir, "evals", f"{step}.jsonl"), "w", encoding="utf-8") as f:
                    f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
        record = {"eval_" + name: x for name, x in found.items()}
        record = {"step": step, **record, "eval_pairs": len(held_out)}
        shown = "loss acc margin kl_w kl_l kl_gap reward reward_se sample_kl sample_rkl entropy"
        write("eval", record, ["eval_" + name for name in shown.split()])

    # -------------------------------------------------------------------------
    # the loop; the first SIGINT or SIGTERM lets the step finish and saves, a second one leaves at once
    signals = []

    def stop_after_step(number, frame):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_after_step)
    peak = None
    if device == "cuda":
        # of the steps and later evaluations, not of what prepared them
        torch.cuda.reset_peak_memory_stats()
        card = torch.cuda.get_device_name()
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    speeds, began_at = [], step
    batch_of = functools.partial(step_indices, batch_size=batch_size, n=len(examples), seed=seed)
    rows = list(rows_of([examples[i] for i in batch_of(step)]))
    while True:
        # once in a while: evaluate and save. What is saved has been evaluated: broken weights never replace good ones
        stop = len(signals) > 0
        if world > 1:               # a signal may reach some processes later
            stop = total(torch.tensor(float(stop), device=device)).item() > 0
        due_eval = step in (0, max_steps) or eval_interval and step % eval_interval == 0
        due_save = step == max_steps or save_interval and step % save_interval == 0
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
            follow = f"continue: python train.py --resume=True --out_dir={out_dir}"
            if step == 0:
                follow = "nothing is saved"
            print(f"stopped after step {step} | {follow}", flush=True)
            sys.exit(128 + (signals or [signal.SIGTERM])[0])

        # one step: its loss is one mean, however its pairs are packed; FSDP takes the mean over processes
        began = time.perf_counter()
        for group in opt.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / max(1, warmup_steps))
        indices = batch_of(step)
        count = sum(len(examples[i][1]) for i in indices) if sft else batch_size
        # on a CPU they stay in place, or the heap would grow
        opt.zero_grad(set_to_none=device != "cpu")
        stats = []
        for batch, counts in rows:
            loss, some = forward(batch, counts)
            (loss * (world / count)).backward()
            stats.append(some)
        # the next step's rows are laid out while the device still works on this one's
        rows = list(rows_of([examples[i] for i in batch_of(step + 1)]))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        found = means(stats, count)
        found["grad_norm"] = norm.full_tensor() if world > 1 else norm
        # here the device is waited for
        found = dict(zip(found, torch.stack(list(found.values())).tolist()))
        if not (math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])):
            sys.exit(f"error: the loss ({found['loss']}) or gradient norm ({found['grad_norm']}) of step {step + 1} is "
                     "not finite. Nothing was saved since the last checkpoint: lower --learning_rate, or look at these "
                     f"{noun}: {', '.join(names[i] for i in indices[:8])}")
        opt.step()
        step += 1

        # log; FLOPs are the policy's forward and backward and the reference's forward
        seconds = time.perf_counter() - began
        n_tokens = sum(sizes[i] for i in indices)
        n_loss = 0
        for i in indices:
            _, chosen, rejected = examples[i]
            n_loss += len(chosen) + len(rejected)
        flops = (6 if sft else 8) * (n_tokens * n_body + n_loss * vocabulary * width)
        # adapters leave the output layer without a gradient
        if lora_rank:
            flops -= 2 * n_loss * vocabulary * width
        record = {"step": step, "epoch": step * batch_size / len(examples), **found}
        record["lr"] = opt.param_groups[0]["lr"]
        record["pairs_per_s"] = batch_size / seconds
        record["tokens_per_s"] = n_tokens / seconds
        record["peak_gib"] = peak_gib(device)
        if peak:
            record["mfu"] = flops / seconds / peak / world
        speeds.append((record["pairs_per_s"], record["tokens_per_s"]))
        shown = []
        if step % log_interval == 0 or step == max_steps:
            shown = "loss acc margin kl_w kl_l kl_gap grad_norm pairs_per_s mfu".split()
        write("step", record, shown)

    # -------------------------------------------------------------------------
    # what came of it
    if task and not sft:
        with sampling():
            eval_imdb.show_completions({"SFT": ref, method: model}, tokenizer, prefixes["test"][:3], score,
                                       max_new_tokens, seed)
    # the first steps warm up
    middle = np.median(speeds[min(3, len(speeds) - 1):], axis=0)
    print(f"\nmedian speed {middle[0]:.2f} {noun}/s, {middle[1]:.0f} tokens/s; peak memory {peak_gib(device):.2f} GiB; "
          f"{time.time() - launched:.0f} s in all")
    if rank == 0:
        try:
            draw_log(out_dir)
            print(f"wrote {os.path.join(out_dir, 'log.png')}")
        except Exception as error:      # no matplotlib, a backend or font that fails: the run is saved all the same
            print(f"note: there is no log.png: {error}")
    follow = f"sample.py --model={out_dir}"
    if sft:
        # the embedded task gives its SFT model another name
        follow = f"train.py --method=tdpo2 --data={data} --init_from={out_dir.removesuffix('-new')}"
    print(f"saved {out_dir} | next: python {follow}", flush=True)
    if world > 1:
        # the group's threads outlive it while FSDP holds it; one that lets go of a tensor once Python is going down
        # aborts the process, so nothing is taken down here
        if rank == 0 and wandb_log:
            wandb.finish()
        dist.destroy_process_group()
        log.close()
        os._exit(0)
