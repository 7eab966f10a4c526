"""Sample responses from a checkpoint, beside its reference where there is one, and measure their entropy and KL.

    python sample.py --model=out/reviews-tdpo2                              # on the prompts that the run held out
    python sample.py --model=out/hh-tdpo2 --num_samples=25                  # predictive entropy as in Table 1
    python sample.py --model=gpt2 --prompt="This film was" --temperature=0.7
    python sample.py --model=DIR --ref=DIR --prompts=questions.jsonl        # with "prompt", text or messages; or a .txt
    python sample.py --model=out/reviews-tdpo2 --show=kl --html=kl.html     # which tokens carry the divergence
    python sample.py --model=DIR --format=mt_bench --prompts=question.jsonl --out=model_answer/NAME.jsonl

Every response becomes one line of a .jsonl file: prompt, model, response, tokens, entropy, surprisal, kl, rkl.
"""
import argparse
import csv
import difflib
import functools
import glob
import gzip
import html
import io
import json
import os
import re
import sys
import time
import uuid

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tdpo import elementwise, token_stats

# the devices that are here, the best first
DEVICES = ["cpu"]
if torch.backends.mps.is_available():
    DEVICES.insert(0, "mps")
if torch.cuda.is_available():
    DEVICES.insert(0, "cuda")

# progress bars are for people; and what a terminal cannot show must not end a run
if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")


def parse(parser, argv=None):
    """argparse's options, with a nearest name for one that does not exist."""
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, parser._option_string_actions, 1, 0)
        parser.error(f"unknown option {name}; did you mean {near[0]}? --help lists them all")
    return options


def writable(parser, path, option="--out"):
    """The path, if a file can be written there: an error before the work, not after it."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        open(path, "a").close()
    except (OSError, ValueError) as error:
        parser.error(f"{path} cannot be written ({error}); name another {option}")
    return path


def load_model(path, device="cpu", cls=AutoModelForCausalLM):
    """(model with fp32 weights and without dropout, tokenizer) of a directory that save_pretrained wrote, or a hub id.

    Ends the program with one sentence where that fails. Code that a model brings along is never run.
    """
    adapter = os.path.join(path, "adapter_config.json")
    if os.path.exists(adapter):
        try:
            base = json.load(open(adapter, encoding="utf-8"))["base_model_name_or_path"]
        except (ValueError, LookupError, TypeError):
            base = "its base model"
        sys.exit(f"error: {path} is an adapter, no whole model: load it on {base} with peft, then save what "
                 "merge_and_unload() returns, and the tokenizer, with save_pretrained")
    # every reason for which a model does not load: OSError, ValueError, KeyError, SafetensorError
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, info = cls.from_pretrained(path, trust_remote_code=False, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        hint = "" if os.path.isdir(path) else " (no local directory; without a hub name one, or use --data=reviews)"
        sys.exit(f"error: cannot load {path}: {type(error).__name__} {error}{hint}".replace("\n", " "))

    # transformers starts missing weights at random, and makes an empty tokenizer where a directory has none
    kind = type(model).__name__
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        sys.exit(f"error: {path}: {len(missing)} tensors of {kind} are not in its weights: {', '.join(missing[:3])}")
    if unexpected:
        print(f"warning: {path}: {kind} has no place for {len(unexpected)} of its tensors: {', '.join(unexpected[:3])}")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        sys.exit(f"error: {path} has no tokenizer; save_pretrained writes one beside the model")
    # neither data nor learning rate could mend that
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            sys.exit(f"error: {path}: its weights are not finite: {name} has NaN or infinite values; take another copy")
    return model.to(device).eval(), tokenizer


def load_reference(path, model, tokenizer):
    """The frozen reference of a policy, on its device. The program ends where its tokens are not the policy's."""
    ref, ref_tokenizer = load_model(path, model.device)
    # the KL compares the same tokens; sizes of one family differ in their padding alone
    if ref_tokenizer.get_vocab() != tokenizer.get_vocab():
        sys.exit(f"error: the reference {path} has another vocabulary than the policy; the KL needs the same in both")
    return ref.requires_grad_(False)


# -----------------------------------------------------------------------------
# rows of any source

KINDS = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def read_rows(source, split="", config="", default="train"):
    """[(where, row)] of .jsonl, .json, .csv (also .gz) or .parquet files (* in a name: several), of a directory that
    datasets knows, or of a hub dataset, whose split is default where none is named. A row that cannot be read is a
    ValueError, which says why. A source that cannot be read ends the program with one sentence."""
    # a file, several by a pattern, or none
    path = os.path.expanduser(source)
    kind = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    files = [path]
    if not os.path.exists(path):
        files = sorted(glob.glob(path, recursive=True))
    rows = []
    try:
        saved = glob.glob(glob.escape(path) + "/state.json")
        if split and (saved or kind in KINDS):
            raise ValueError("it has no splits: leave --data_split and --eval_split out, and name files of either")
        if kind in KINDS and not files:
            raise ValueError("there is no such file")
        # text needs no datasets, whose import takes seconds
        if kind not in KINDS or kind == ".parquet":
            from datasets import load_dataset, load_from_disk
        if kind == ".parquet":
            table = load_dataset("parquet", data_files=[glob.escape(x) for x in files], split="train")
        elif kind in KINDS:
            for file in files:
                rows += read_text(file, kind)
            table = []
        elif saved:
            table = load_from_disk(path)
        elif os.path.exists(os.path.join(path, "dataset_dict.json")):
            tables = load_from_disk(path)
            if (split or default) not in tables:
                raise ValueError(f'Unknown split "{split or default}". Should be one of {list(tables)}.')
            table = tables[split or default]
        elif glob.glob(glob.escape(path) + "/*.csv"):
            raise ValueError(f"of a directory with .csv files name the files: {source}/*.csv")
        elif os.path.isdir(path) or re.fullmatch(r"[\w-]+/[\w.-]+", source):
            table = load_dataset(path, config or None, split=split or default)
        else:
            raise ValueError("it is no .jsonl, .json, .csv or .parquet file, no directory and no hub id (owner/name)")
        rows += [(f"{source} row {n}", row) for n, row in enumerate(table, 1)]
    except Exception as error:      # datasets wraps what its readers raise: the last cause is the one that tells
        while error.__cause__:
            error = error.__cause__
        said = str(error).split("\nExample")[0].replace("\n", " ")
        if re.search("Unknown split|Config name|BuilderConfig", said):
            said += " Options: --data_split, --eval_split, --data_config"
        sys.exit(f"error: cannot read {source}: {said}")
    if not rows:
        sys.exit(f"error: {source} has no rows")
    return rows


def read_text(path, kind):
    """The same of one .jsonl, .json, .csv or .txt file, which may be compressed."""
    with open(path, "rb") as f:
        content = f.read()
    if path.lower().endswith(".gz"):
        content = gzip.decompress(content)

    # a cell is text: None, NA and 007 are answers
    if kind == ".csv":
        csv.field_size_limit(2**31 - 1)
        table = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        rows = []
        for n, row in enumerate(table, 1):
            if None in row:
                row = ValueError("has more cells than there are columns: quote those that hold commas")
            rows.append((f"{path} row {n}", row))
        return rows

    # a list of rows, an object of columns or around rows, or one row; else .json holds lines, too
    table = None
    if kind == ".json":
        try:
            table = json.loads(content)
        except (ValueError, RecursionError):
            pass
    if isinstance(table, dict):
        columns = [x for x in table.values() if is_column(x)]
        if not columns:
            table = [table]
        elif len(table) == 1 and all(isinstance(x, dict) for x in columns[0]):
            (table,) = columns
        elif len(columns) == len(table) and len(set(map(len, columns))) == 1:
            table = [dict(zip(table, values)) for values in zip(*columns)]
        else:
            raise ValueError(f"its object of {', '.join(table)} is no list of rows, nor of equally long columns")
    if isinstance(table, list):
        return [(f"{path} row {n}", row) for n, row in enumerate(table, 1)]

    # line by line, so that a bad line has a number and costs only itself
    rows = []
    for n, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = line.decode("utf-8-sig")
            row = {"prompt": row} if kind == ".txt" else json.loads(row)
        except (ValueError, RecursionError) as error:
            row = ValueError(f"is not JSON: {error}")
        rows.append((f"{path} line {n}", row))
    return rows


def is_column(x):
    """Whether it is a list, but none of messages."""
    return isinstance(x, list) and not (x and isinstance(x[0], dict) and "role" in x[0])


# -----------------------------------------------------------------------------
# prompts and responses

ROLES = ("system", "developer", "user", "assistant", "tool")


def without_nulls(x):
    """Without the keys that a table fills up with null."""
    if isinstance(x, dict):
        return {name: without_nulls(value) for name, value in x.items() if value is not None}
    if isinstance(x, list):
        return [without_nulls(value) for value in x]
    return x


def read_message(message):
    """A message as templates take it: a known role, and content that is text. ValueError: what is wrong with it."""
    if not isinstance(message, dict):
        raise ValueError("has a message that is no object with role and content")
    if "from" in message:
        raise ValueError("has messages of from and value: rename them to role and content, and human and gpt to user "
                         "and assistant")
    if message.get("role") not in ROLES:
        raise ValueError(f"has a message of the role {message.get('role')!r}: rename it to one of {', '.join(ROLES)}")

    # a call needs no content; parts are joined, if all are text
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        parts = [x.get("text") for x in content if isinstance(x, dict) and x.get("type") == "text"]
        if len(parts) == len(content) and all(isinstance(x, str) for x in parts):
            content = "".join(parts)
    if not isinstance(content, str):
        raise ValueError(f"has a message of the {message['role']} without content, or whose content is not text")
    # tables fill up with empty lists and texts, too
    message = {name: x for name, x in message.items() if x not in ("", [])}
    return {**message, "content": content}


def chat(tokenizer, messages, generation_prompt=True, tools=None):
    """Messages through the model's chat template, as text. ValueError: what is wrong with them. Without a template the
    program ends."""
    if not tokenizer.chat_template:
        sys.exit("error: these are chat messages, but the tokenizer has no chat template: use text, or a chat model")
    try:
        return tokenizer.apply_chat_template(messages, tools, tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:      # a template raises what it likes
        raise ValueError(f"is refused by the model's chat template: {error}")


@functools.lru_cache
def opening(tokenizer):
    """The ids that a tokenizer puts in front of every text by itself: BOS, where it does."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    while ids and ids[-len(bare):] != bare:
        ids.pop()
    return ids[:len(ids) - len(bare)]


def encode_prompt(tokenizer, text):
    """Token ids of a prompt: those of its text behind what the tokenizer puts in front, once, and nothing that it puts
    behind. An empty prompt is one BOS (or EOS)."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = opening(tokenizer)
    # a template may have written its BOS already
    if ids[:len(first)] != first:
        ids = first + ids
    if ids:
        return ids
    known = [x for x in (tokenizer.bos_token_id, tokenizer.eos_token_id) if x is not None]
    if not known:
        sys.exit("error: an empty prompt needs a BOS or EOS token, and the tokenizer has neither; give a prompt")
    return known[:1]


def stop_tokens(model, tokenizer):
    """The ids that end a response: EOS, and what the model's generation config adds, say the end of a turn."""
    stop = model.generation_config.eos_token_id
    if not isinstance(stop, list):
        stop = [stop]
    return {tokenizer.eos_token_id, *stop} - {None}


def response_text(tokenizer, prompt, response):
    """The response's ids as text: what they add to the decoded prompt, so that prompt + response reads as one text."""
    # decoded alone, it could begin inside a character or lose a space
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(prompt + response, skip_special_tokens=True)[len(start):]


@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens, num_samples=1, temperature=1.0, top_p=1.0, seed=0):
    """num_samples responses to each prompt (a list of token ids): lists of token ids, EOS included where it was drawn.

    A response ends at the model's last position at the latest. Same seed, same responses; the caller's random state is
    untouched. On a GPU it samples in bf16. Under FSDP all processes call it, and all get what rank 0 has drawn.
    """
    # padding is masked, so any token will do
    stop = stop_tokens(model, tokenizer)
    pad = min(stop, default=0)
    config = GenerationConfig(do_sample=True, temperature=temperature, top_p=top_p, top_k=0, pad_token_id=pad,
                              eos_token_id=sorted(stop) or None)
    known = len(model.get_input_embeddings().weight)
    highest = max(map(max, prompts), default=0)
    if highest >= known:
        sys.exit(f"error: a prompt has the token {highest}, the model knows {known}; leave it out")

    # every prompt num_samples times; the longest go first, so that memory runs out at once or never
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    longest = max(map(len, prompts), default=0)
    if longest >= positions:
        sys.exit(f"error: a prompt of {longest} tokens leaves no room for a response within {positions} positions")
    order = list(range(len(prompts))) * num_samples
    order.sort(key=lambda i: len(prompts[i]))
    responses = [[] for _ in prompts]

    # the model's own habits, say a repetition penalty, would fill what config leaves open
    own_config = model.generation_config
    model.generation_config = GenerationConfig()
    sharded = isinstance(model, FSDPModule)
    kind = model.device.type
    gpus = [model.device] if kind == "cuda" else []
    bar = tqdm(total=len(order), desc="sampling", leave=False, disable=None)
    # and where its caller computes in bf16
    low = kind == "cuda" or torch.is_autocast_enabled(kind)
    with torch.random.fork_rng(gpus), torch.autocast(kind, torch.bfloat16, enabled=low):
        torch.manual_seed(seed)
        while order:
            # a batch of prompts, padded on the left
            width = len(prompts[order[-1]])
            count = max(1, min(512, 2**15 // (width + max_new_tokens)))
            batch, order = order[-count:], order[:-count]
            ids = [torch.tensor(prompts[i]) for i in batch]
            mask = [torch.ones_like(x) for x in ids]
            mask = pad_sequence(mask, True, 0, "left").to(model.device)
            ids = pad_sequence(ids, True, pad, "left").to(model.device)
            config.max_new_tokens = min(max_new_tokens, positions - width)
            out = model.generate(ids, attention_mask=mask, generation_config=config, synced_gpus=sharded)[:, width:]

            # processes that draw one token apart would drift further apart
            if sharded:
                missing = config.max_new_tokens - out.shape[1]
                out = torch.nn.functional.pad(out, (0, missing), value=pad)
                out = out.contiguous()
                dist.broadcast(out, 0)

            # what follows the first EOS is padding
            for i, new in zip(batch, out.tolist()):
                end = next((t for t, token in enumerate(new) if token in stop), len(new))
                responses[i].append(new[:end + 1])
            bar.update(len(batch))
    bar.close()
    model.generation_config = own_config
    return responses


def token_measures(logits, ref_logits, labels):
    """{name: (N,)} of the tokens labels (N,) that logits and ref_logits (N, V) predict; see `measure`."""
    tokens = token_stats(logits, ref_logits, labels)
    logp = logits.float().log_softmax(-1)
    entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
    return {"entropy": entropy, "surprisal": -tokens.logp, "logratio": tokens.logratio, "kl": tokens.kl,
            "rkl": tokens.rkl}


@torch.no_grad()
def measure(model, ref, prompts, responses):
    """What each token adds, in nats: for each response (prompts[i], responses[i], lists of token ids) a dict of arrays,
    one value a token: entropy of the policy, surprisal -log pi(token), and against ref, 0 without one, logratio
    log pi(token) - log ref(token), kl = KL(ref || model) as in Eq. 10 and rkl = KL(model || ref)."""
    # entries that only one of the two has are padding
    vocabulary = min(len(m.get_output_embeddings().weight) for m in (model, ref) if m is not None)
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    result = [None] * len(prompts)
    with tqdm(total=len(order), desc="measuring", leave=False, disable=None) as bar:
        while order:
            # the largest first, in batches of bounded logits; padding behind a text changes nothing before it
            count = max(1, min(256, 2**26 // (lengths[order[-1]] * vocabulary)))
            batch, order = order[-count:], order[:-count]
            ids = [torch.tensor(prompts[i] + responses[i]) for i in batch]
            labels = [torch.tensor([-100] * len(prompts[i]) + responses[i]) for i in batch]
            ids = pad_sequence(ids, True).to(model.device)
            labels = pad_sequence(labels, True, -100).to(model.device)

            # logits at t predict token t + 1
            response = labels[:, 1:] != -100
            logits = model(ids, use_cache=False).logits[:, :-1, :vocabulary][response]
            ref_logits = logits
            if ref is not None:
                ref_logits = ref(ids, use_cache=False).logits[:, :-1, :vocabulary][response]
            # train.py forbids compiling while it samples; here it saves most of the time
            with torch.compiler.set_stance("default"):
                columns = elementwise(token_measures, logits, ref_logits, labels[:, 1:][response])

            # of all tokens of the batch those of each response
            for name, column in columns.items():
                values = column.cpu().split([len(responses[i]) for i in batch])
                for i, x in zip(batch, values):
                    result[i] = {**(result[i] or {}), name: x.double().numpy()}
            bar.update(len(batch))
    return result


def response_stats(measured):
    """Per response in nats, of what `measure` returns: entropy, surprisal, kl, rkl (arrays). entropy is the mean over
    tokens of -sum_v p log p (f-DPO's definition), surprisal its Monte-Carlo form; kl and rkl are sums over tokens."""
    result = {}
    for name in ("entropy", "surprisal"):
        result[name] = np.array([tokens[name].mean() for tokens in measured])
    for name in ("kl", "rkl"):
        result[name] = np.array([tokens[name].sum() for tokens in measured])
    return result


def ratio_mean(values, weights, groups):
    """(mean, its standard error over groups) of values. weights: tokens, for a mean over tokens; groups: prompts."""
    values = np.asarray(values)
    if weights is None:
        weights = np.ones(len(values))
    weights = np.asarray(weights)
    mean = np.average(values, weights=weights)
    # a ratio of sums over groups, linearized
    spread = np.bincount(groups, weights * (values - mean))
    n = len(spread)
    if n == 1:
        return float(mean), float("nan")
    variance = (spread**2).sum() * n / (n - 1)
    return float(mean), float(np.sqrt(variance) / weights.sum())


# -----------------------------------------------------------------------------
# the token level, made visible

# the shares of a response's sum from which on a token is one shade darker
SHADES = (0.02, 0.05, 0.1, 0.2, 0.4)
LEGEND = "a token's share of its response's {} (absolute values; blue is below 0), from {} on"
PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 17px/1.6 sans-serif; max-width: 60em; margin: 1em auto; padding: 0 1em }}
p {{ white-space: pre-wrap; margin: 0.4em 0 }}</style>
<h2>{title}</h2>
{body}
"""


def token_texts(tokenizer, prompt, response):
    """The text that each token adds to those before it; a character of several tokens stands with the last of them."""
    texts, done = [], tokenizer.decode(prompt)
    for n in range(1, len(response) + 1):
        text = tokenizer.decode(prompt + response[:n])
        if text.endswith("\ufffd") and n < len(response):
            texts.append("")
            continue
        # some tokens have no text at all
        texts.append(text[len(done):] or "∅")
        done = text
    return texts


def paint(text, share, page, title=""):
    """A token's text on the color of its share, red or, below 0, blue: HTML for a page, else for a terminal."""
    strong = (225, 70, 40) if share > 0 else (50, 110, 235)
    depth = sum(abs(share) >= shade for shade in SHADES) / len(SHADES)
    red, green, blue = [round(255 + depth * (x - 255)) for x in strong]
    if page:
        return f'<span style="background: rgb({red},{green},{blue})" title="{title}">{html.escape(text)}</span>'
    # nothing that a model writes moves the terminal's cursor
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"\033[30;48;2;{red};{green};{blue}m{text}\033[0m"


def shaded(texts, values, name, page):
    """A response's tokens, each on the color of its share of sum(|values|), and the sum of values, in nats."""
    whole = max(np.abs(values).sum(), 1e-9)
    painted, value = "", 0.0
    for text, x in zip(texts, values):
        # tokens that show nothing count with the character that they begin
        value += x
        if text:
            painted += paint(text, value / whole, page, f"{value:.3f} nats")
            value = 0.0
    return painted + f" [{name} {values.sum():.2f} nats]"


# -----------------------------------------------------------------------------
# the script


def write_samples(args, model, tokenizer, ref, texts):
    """Responses of the reference and of the policy side by side, each a line of args.out; then the means."""
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    # response n is one to prompt index[n]
    index = np.repeat(range(len(prompts)), args.num_samples)
    models = {"policy": (model, ref)}
    if ref is not None:
        models = {"reference": (ref, None), **models}
    # of each prompt its responses: (model, response, None or the texts and values of its tokens)
    rows, means, entries = [], [], [[] for _ in texts]
    for name, (m, against) in models.items():
        drawn = generate(m, tokenizer, prompts, args.max_new_tokens, args.num_samples, args.temperature, args.top_p,
                         args.seed)
        responses = [response for group in drawn for response in group]
        measured = measure(m, against, [prompts[i] for i in index], responses)
        stats = response_stats(measured)

        # a row for each response; there is no divergence without a reference
        if against is None:
            stats = {key: stats[key] for key in ("entropy", "surprisal")}
        for n, i in enumerate(index):
            text = response_text(tokenizer, prompts[i], responses[n])
            tokens = None
            # the reference does not diverge from itself
            if args.show and (against is not None or args.show == "surprisal"):
                tokens = token_texts(tokenizer, prompts[i], responses[n]), measured[n][args.show]
            entries[i].append((name, text, tokens))
            sums = {key: float(values[n]) for key, values in stats.items()}
            rows.append(dict(prompt=texts[i], model=name, response=text, tokens=len(responses[n]), **sums))

        # a line for each model: means over tokens, or over responses
        lengths = np.array([len(response) for response in responses])
        line = f"{name:9} | {len(responses)} responses"
        for key, values in stats.items():
            mean, error = ratio_mean(values, lengths if key in ("entropy", "surprisal") else None, index)
            line += f" | {key} {mean:.4f}"
            if len(texts) > 1:
                line += f" ± {error:.4f}"
        means.append(line)

    # the file, then the screen
    with open(args.out, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for prompt, entry in zip(texts, entries):
        print("\n" + prompt.strip())
        for name, text, tokens in entry:
            print(f"  {name:9} |" + (shaded(*tokens, args.show, page=False) if tokens else text))
    if args.show:
        print("\n" + LEGEND.format(args.show, "".join(paint(f" {x:.0%} ", x, page=False) for x in SHADES)))
    if args.html:
        body = [LEGEND.format(args.show, "".join(paint(f" {x:.0%} ", x, page=True) for x in SHADES))]
        for prompt, entry in zip(texts, entries):
            body.append(f"<h3>{html.escape(prompt.strip())}</h3>")
            for name, text, tokens in entry:
                text = shaded(*tokens, args.show, page=True) if tokens else html.escape(text)
                body.append(f"<p><i>{name}</i> {text}</p>")
        with open(args.html, "w", encoding="utf-8") as f:
            f.write(PAGE.format(title=html.escape(f"{args.model}: {args.show}"), body="\n".join(body)))
    print("\n" + "\n".join(means))
    print(f"nats, entropy and surprisal a token, ± standard error over {len(texts)} prompts; wrote {args.out}")


def write_answers(args, model, tokenizer, rows):
    """Answers to MT-bench's questions (all turns) or AlpacaEval's instructions, in the form that the judge reads."""
    bench = args.format == "mt_bench"
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    turns = [row["turns"] if bench else [row["instruction"]] for row in rows]
    # a turn of all questions at a time
    histories = [[] for _ in rows]
    for turn in range(max(map(len, turns))):
        # the questions that have such a turn, each behind the answers so far
        prompts = {}
        for n in range(len(rows)):
            if turn >= len(turns[n]):
                continue
            histories[n].append({"role": "user", "content": turns[n][turn]})
            try:
                prompts[n] = encode_prompt(tokenizer, chat(tokenizer, histories[n]))
            except ValueError as error:
                sys.exit(f"error: question {n + 1} {error}")
            # without room it has no answer, and the others keep theirs
            if len(prompts[n]) >= positions:
                print(f"warning: question {n + 1} is too long in turn {turn + 1}: its answer is empty")
                histories[n].append({"role": "assistant", "content": ""})
                del prompts[n]
        drawn = generate(model, tokenizer, list(prompts.values()), args.max_new_tokens, 1, args.temperature,
                         args.top_p, args.seed + turn)

        # a model that was trained on HH may go on with the next question
        for (n, prompt), (response,) in zip(prompts.items(), drawn):
            text = response_text(tokenizer, prompt, response).split("\n\nHuman:")[0].strip()
            histories[n].append({"role": "assistant", "content": text})

    # FastChat takes the model's name from the file's
    name = os.path.splitext(os.path.basename(args.out))[0]
    answers = []
    for row, history in zip(rows, histories):
        replies = [message["content"] for message in history[1::2]]
        if bench:
            answers.append({
                "question_id": row["question_id"], "answer_id": uuid.uuid4().hex, "model_id": name,
                "choices": [{"index": 0, "turns": replies}], "tstamp": time.time(),
            })
        else:
            answers.append({"instruction": row["instruction"], "output": replies[0], "generator": name})

    # lines of JSON for one, a list for the other
    with open(args.out, "w", encoding="utf-8") as f:
        if bench:
            f.writelines(json.dumps(answer) + "\n" for answer in answers)
        else:
            json.dump(answers, f, indent=1)
    print(f"wrote {len(answers)} answers to {args.out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    parser.add_argument("--ref", default="", help="reference; default: the one the checkpoint was trained against")
    parser.add_argument("--prompts", default="", help=".jsonl or .txt; default: those that the run in --model held out")
    parser.add_argument("--prompt", default="", help="one prompt")
    parser.add_argument("--chat", action="store_true", help="put prompts that are text through the chat template")
    parser.add_argument("--format", default="samples", choices=("samples", "mt_bench", "alpaca_eval"),
                        help="samples beside the reference's, or answers for FastChat's or AlpacaEval's judge")
    parser.add_argument("--show", default="", choices=("kl", "logratio", "surprisal"),
                        help="shade each token by its share of KL(ref || model), log pi - log ref or -log pi")
    parser.add_argument("--html", default="", help="with --show: write the shaded responses as a page, too")
    parser.add_argument("--num_prompts", type=int, default=8, help="at most so many, 0 for all (default 8)")
    parser.add_argument("--num_samples", type=int, default=1, help="responses a prompt (default 1)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="(default 128)")
    parser.add_argument("--temperature", type=float, default=1.0, help="(default 1)")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus (default 0.95)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=DEVICES[0], choices=DEVICES)
    parser.add_argument("--out", default="", help="file to write or replace; default: samples.jsonl in --model")
    args = parse(parser)

    # what belongs together
    folder = args.model if os.path.isdir(args.model) else "."
    judged = args.format != "samples"
    held_out = os.path.join(folder, "prompts.jsonl")
    for fails, message in (
        (judged and not (args.prompts and args.out), f"--format={args.format} needs --prompts and --out"),
        (judged and (args.prompt or args.ref or args.show or args.num_samples > 1),
         f"--format={args.format} has no use for --prompt, --ref, --show and --num_samples"),
        (args.html and not args.show, "--html needs --show=kl, logratio or surprisal"),
        (args.chat and not (args.prompt or args.prompts), "--chat: a run's own prompts have gone through it"),
        (args.prompt and args.prompts, "--prompt and --prompts exclude each other"),
        (not (args.prompt or args.prompts or os.path.exists(held_out)),
         f"{args.model} is no run that held out prompts: give --prompt or --prompts"),
        (min(args.num_samples, args.max_new_tokens) < 1, "--num_samples and --max_new_tokens must be 1 or more"),
        (not 0 < args.temperature < float("inf"), "--temperature must be greater than 0"),
        (not 0 < args.top_p <= 1, "--top_p must be in (0, 1]"),
        (args.num_prompts < 0 or not 0 <= args.seed < 2**63, "--num_prompts and --seed must be 0 or more"),
    ):
        if fails:
            parser.error(message)
    args.out = writable(parser, args.out or os.path.join(folder, "samples.jsonl"))
    if args.html and os.path.realpath(args.html) == os.path.realpath(args.out):
        parser.error("--html and --out name the same file")
    if args.html:
        writable(parser, args.html, "--html")

    # prompts, and the model
    if args.prompt:
        rows = [("the prompt", {"prompt": args.prompt})]
    else:
        rows = read_rows(args.prompts or held_out)
    rows = rows[:args.num_prompts or None]
    columns = {"samples": {"prompt": (str, list)}, "alpaca_eval": {"instruction": str},
               "mt_bench": {"question_id": object, "turns": list}}
    for where, row in rows:
        for name, kind in columns[args.format].items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                sys.exit(f"error: {where} is no JSON object with {' and '.join(columns[args.format])}")
    model, tokenizer = load_model(args.model, args.device)
    if judged:
        write_answers(args, model, tokenizer, [row for _, row in rows])
        sys.exit()

    # messages go through the chat template
    texts = []
    # a run's own prompts went through it when they were trained on
    own = not (args.prompt or args.prompts)
    if tokenizer.chat_template and not (args.chat or own) and any(isinstance(row["prompt"], str) for _, row in rows):
        print("note: text is taken as it stands; --chat puts it through the model's chat template")
    for where, row in rows:
        text = row["prompt"]
        if args.chat and isinstance(text, str):
            text = [{"role": "user", "content": text}]
        try:
            if isinstance(text, list):
                row = without_nulls({**row, "prompt": text})
                messages = [read_message(x) for x in row["prompt"]]
                if row.get("system"):
                    messages.insert(0, read_message({"role": "system", "content": row["system"]}))
                text = chat(tokenizer, messages, tools=row.get("tools") or None)
            elif row.get("system") or row.get("tools"):
                raise ValueError("has system or tools beside text: give the prompt as messages")
            text.encode()
        except ValueError as error:
            sys.exit(f"error: {where} {error}")
        texts.append(text)

    # by default the reference is the one that the checkpoint was trained against
    options = os.path.join(folder, "options.json")
    if not args.ref and os.path.exists(options):
        run = json.load(open(options, encoding="utf-8"))
        if isinstance(run, dict) and run.get("method", "sft") != "sft":
            args.ref = run.get("ref_from") or run.get("init_from", "")
    ref = None
    if args.ref:
        ref = load_reference(args.ref, model, tokenizer)
    elif args.show in ("kl", "logratio"):
        sys.exit(f"error: --show={args.show} compares with a reference, and {args.model} names none: give --ref")
    write_samples(args, model, tokenizer, ref, list(dict.fromkeys(texts)))
