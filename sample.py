"""Sample responses from a checkpoint and from its reference, side by side, and measure their entropy and KL.

    python sample.py --model=out/reviews-tdpo2                              # on the prompts that the run held out
    python sample.py --model=out/hh-tdpo2 --num_samples=25                  # predictive entropy as in Table 1
    python sample.py --model=gpt2 --prompt="This film was" --temperature=0.7
    python sample.py --model=DIR --ref=DIR --prompts=questions.jsonl        # lines with "prompt": text or messages

Every response becomes one line of a .jsonl file: prompt, model, response, tokens, entropy, surprisal, kl, rkl.
python -m extras.show shades the tokens of responses, and python -m extras.judge answers MT-bench's questions.
"""
import argparse
import difflib
import errno
import functools
import json
import os
import re
import sys
import tempfile

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tdpo import elementwise, token_stats

# the devices of this machine, the fastest first
DEVICES = ["cpu"]
if torch.backends.mps.is_available():
    DEVICES.insert(0, "mps")
if torch.cuda.is_available():
    DEVICES.insert(0, "cuda")

# progress bars are for people, and a character that a terminal cannot show must not end a run
if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")


def explain(kind, error, trace):
    """One sentence in place of a traceback if the disk is full or broken, or if train.py has filled a GPU's memory."""
    if kind is OSError and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
        print(f"error: {error}: make room, and start again; a run that has saved a checkpoint continues from it with "
              "--resume=True", file=sys.stderr)
    elif kind is torch.OutOfMemoryError and os.path.basename(sys.argv[0]) == "train.py":
        print(f"error: {error}. These options take less memory: --checkpoint_activations=True, a smaller "
              "--micro_tokens or --max_length, --lora_rank=16, or more processes (torchrun)", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = explain


def parse(parser, argv=None):
    """argparse's options, with ~ expanded. The error for an unknown option names the option that is nearest to it."""
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, parser._option_string_actions, 1, 0)
        parser.error(f"unknown option {name}; did you mean {near[0]}? --help lists them all")
    # shells leave a ~ after = as it is; an option may name several paths
    for name, value in vars(options).items():
        if isinstance(value, str) and name != "prompt":
            setattr(options, name, ",".join(map(os.path.expanduser, value.split(","))))
    return options


# -----------------------------------------------------------------------------
# files that a script writes


def writable(parser, path, option="--out"):
    """The path, if a file can be written there, so that an error comes before the work. It is not created."""
    target = os.path.realpath(path)
    # up to a folder that exists; `create` makes the others
    folder = os.path.dirname(target)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        if os.path.exists(target) or not os.path.basename(path):
            open(path, "ab").close()
        else:
            tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        parser.error(f"{path} cannot be written ({error}); choose a different {option}")
    return path


def create(path):
    """A new file, open for writing text, in a folder that is made if it is missing."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    return open(path, "w", encoding="utf-8")


def write_lines(path, rows):
    """Write each of the rows as a line of JSON."""
    with create(path) as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def reason_of(error):
    """What the innermost error says, on one line: datasets wraps the errors of its readers in others. It may go on with
    examples of code, which are left out."""
    while error.__cause__:
        error = error.__cause__
    return str(error).split("\nExample")[0].replace("\n", " ")


# -----------------------------------------------------------------------------
# models


def load_model(path, device="cpu", cls=AutoModelForCausalLM):
    """(model with fp32 weights and without dropout, tokenizer) of a directory that save_pretrained wrote, or a hub id.

    Exits with one sentence if it cannot load them. Code that comes with a model is never run.
    """
    adapter = os.path.join(path, "adapter_config.json")
    if os.path.exists(adapter):
        try:
            base = json.load(open(adapter, encoding="utf-8"))["base_model_name_or_path"]
        except (ValueError, LookupError, TypeError):
            base = "its base model"
        sys.exit(f"error: {path} is an adapter, not a whole model: load it on {base} with peft, then save the result "
                 "of merge_and_unload() and the tokenizer with save_pretrained")
    if os.path.isabs(path) and not os.path.exists(path):
        sys.exit(f"error: {path} is gone; name the place where this model is now")
    # models fail to load with OSError, ValueError, KeyError, SafetensorError and more
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, info = cls.from_pretrained(path, trust_remote_code=False, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        hint = ""
        if not os.path.isdir(path):
            hint = " (this is not a local directory; without the hub name one, or use --data=reviews)"
        reason = str(error).split("\nModel type should be")[0]      # one of 200 classes
        sys.exit(f"error: cannot load {path}: {type(error).__name__} {reason}{hint}".replace("\n", " "))

    # transformers fills in missing weights at random, and makes an empty tokenizer if a directory has none
    kind = type(model).__name__
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        sys.exit(f"error: {path}: its weights lack {len(missing)} tensors of {kind}: {', '.join(missing[:3])}")
    if unexpected:
        print(f"warning: {path}: {kind} has no place for {len(unexpected)} of its tensors: {', '.join(unexpected[:3])}")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        sys.exit(f"error: {path} has no tokenizer; save one beside the model with save_pretrained")
    # no choice of data or learning rate could repair such weights
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            sys.exit(f"error: {path}: its weights are not finite: {name} has NaN or infinite values; get a sound copy")
    return model.to(device).eval(), tokenizer


def load_reference(path, tokenizer, device="cpu"):
    """The frozen reference of a policy that has the tokenizer. Exits if the two have different vocabularies."""
    ref, ref_tokenizer = load_model(path, device)
    # the KL compares the same tokens; models of one family may still pad their embeddings to different sizes
    if ref_tokenizer.get_vocab() != tokenizer.get_vocab():
        sys.exit(f"error: the reference {path} and the policy have different vocabularies; the KL needs the same one")
    return ref.requires_grad_(False)


def reference_of(folder):
    """The path of the reference that the run in folder was trained against, or "" if there is none or it is gone. A
    folder that happens to have the name of its hub id is a different model."""
    path = os.path.join(folder, "options.json")
    if not os.path.exists(path):
        return ""
    run = json.load(open(path, encoding="utf-8"))
    if not isinstance(run, dict) or run.get("method", "sft") == "sft":
        return ""
    reference = run.get("ref_from") or run.get("init_from", "")
    if os.path.isabs(reference) != os.path.isdir(reference):
        problem = "is gone" if os.path.isabs(reference) else "was on the hub, but is a folder here"
        print(f"note: the run's reference {reference} {problem}; --ref=DIR names it")
        return ""
    return reference


# -----------------------------------------------------------------------------
# prompts


def parse_json(text):
    """The value of a JSON text. NaN, which is what some write for an empty cell of a table, is read as null."""
    return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))


def read_prompts(path):
    """[("FILE line N", row)] of a .jsonl file of objects with "prompt", or of a .txt file with a prompt in each line.
    Exits at a line that cannot be read."""
    if not path.endswith((".jsonl", ".txt")):
        sys.exit(f"error: {path} is not a .jsonl or .txt file: write the prompts line by line into one of these")
    rows, number = [], 0
    try:
        with open(path, encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                row = {"prompt": line.rstrip("\n")}
                if path.endswith(".jsonl"):
                    row = parse_json(line)
                rows.append((f"{path} line {number}", row))
    except (OSError, ValueError, RecursionError) as error:
        sys.exit(f"error: cannot read {path}, line {number}: {error}")
    if not rows:
        sys.exit(f"error: {path} has no prompts")
    return rows


# the answer may depend on these columns, and they are not read
UNREAD = ("messages", "history", "conversations", "system_prompt", "system_message", "chat_template_kwargs",
          "functions", "context", "documents", "image", "images", "audio", "audios", "video", "videos")
# messages that were written as text, as a list or a single one
AS_TEXT = r"""\s*\[?\s*\{(?=[^}]*['"](role|from)['"]\s*:)(?=[^}]*['"](content|value)['"]\s*:)"""


def check_columns(row, columns):
    """ValueError if a row has more than its columns {name: text or messages}, and the answer may depend on that, or if
    they are messages that were written as text."""
    for name in UNREAD:
        if row.get(name) and row[name] not in columns.values():
            raise ValueError(f"has {name!r}, which is not read: write it into prompt, system or messages of role and "
                             "content, or remove the column")
    for name, text in columns.items():
        if isinstance(text, str) and re.match(AS_TEXT, text):
            raise ValueError(f"has messages written as text in {name!r}: parse the column (json.loads) first")


def read_tools(row):
    """The tools of a row, or None. Some tables hold them as JSON."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools.strip() or "null")
        except (ValueError, RecursionError):
            raise ValueError("has tools that are no JSON")
    return tools or None


def with_system(row, conversations):
    """Conversations that begin with the row's system column, if it has one."""
    if not str(row.get("system") or "").strip():
        return conversations
    system = read_message({"role": "system", "content": row["system"]})
    if any(x["role"] == "system" and x != system for messages in conversations for x in messages):
        raise ValueError("has a system column and a different system message: remove one of them")
    return [x if system in x else [system, *x] for x in conversations]


ROLES = ("system", "developer", "user", "assistant", "tool")


def read_message(message):
    """A message as templates expect it, with a known role and with text as content. ValueErrors say what is wrong."""
    if not isinstance(message, dict):
        raise ValueError("has a message that is not an object with role and content")
    if "from" in message:
        raise ValueError("has messages with from and value: rename them to role and content, and human and gpt to "
                         "user and assistant")
    if message.get("role") not in ROLES:
        raise ValueError(f"has a message of the role {message.get('role')!r}: rename it to one of {', '.join(ROLES)}")

    # a message with a call needs no content, and parts are joined if all of them are text
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        parts = [x.get("text") for x in content if isinstance(x, dict) and x.get("type") == "text"]
        if len(parts) == len(content) and all(isinstance(x, str) for x in parts):
            content = "".join(parts)
    if not isinstance(content, str):
        raise ValueError(f"has a message of the {message['role']} without content, or whose content is not text")
    # templates ask whether a key is there, and tables put one of these into an empty cell
    message = {name: x for name, x in message.items() if x not in (None, "", [])}
    return {**message, "content": content}


def chat(tokenizer, messages, generation_prompt=True, tools=None):
    """Messages as text, rendered by the chat template; exits without one. ValueErrors say what is wrong with them."""
    if not tokenizer.chat_template:
        sys.exit("error: these are chat messages, but the tokenizer has no chat template: use text, or a chat model")
    try:
        text = tokenizer.apply_chat_template(messages, tools, tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:      # templates raise all kinds of errors
        raise ValueError(f"is refused by the model's chat template: {error}")
    if tools and text == chat(tokenizer, messages, generation_prompt):
        raise ValueError("has tools, but the model's chat template does not print them")
    return text


def check_printed(tokenizer, messages, text, tools=None):
    """ValueError if text, the conversation as the template prints it, lacks a message or a part of one."""
    # say a role that the template does not know, or words beside a tool call
    marks = [f"|{n}|" if x["content"].strip() else "" for n, x in enumerate(messages)]
    marked = chat(tokenizer, [{**x, "content": mark} for x, mark in zip(messages, marks)], False, tools)
    for mark, message in zip(marks, messages):
        if mark not in marked:
            raise ValueError(f"has a text of the {message['role']} that the model's chat template does not print")
    for key in ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"):
        without = [{name: x for name, x in message.items() if name != key} for message in messages]
        if without != messages and text == chat(tokenizer, without, False, tools):
            raise ValueError(f"has {key}, but the model's chat template does not print it")
    if re.search(r'"arguments": "\{', text) and any("tool_calls" in x for x in messages):
        raise ValueError("has arguments of a tool call as text, which the template encodes once more: parse them")


@functools.lru_cache
def opening(tokenizer):
    """The ids that a tokenizer puts in front of every text by itself: none, or BOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    while ids and ids[-len(bare):] != bare:
        ids.pop()
    return ids[:len(ids) - len(bare)]


def encode_prompt(tokenizer, text):
    return encode_prompts(tokenizer, [text])[0]


def encode_prompts(tokenizer, texts):
    """Token ids of one or more prompts: the tokenizer's `opening`, once, and those of the text, without any that the
    tokenizer appends. An empty prompt is one BOS (or EOS)."""
    first = opening(tokenizer)
    encoded = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        # a template may have written its BOS already
        if ids[:len(first)] != first:
            ids = first + ids
        if not ids:
            ids = [x for x in (tokenizer.bos_token_id, tokenizer.eos_token_id) if x is not None][:1]
        if not ids:
            sys.exit("error: an empty prompt needs a BOS or EOS token, and the tokenizer has neither; write a prompt")
        encoded.append(ids)
    return encoded


def prompt_text(tokenizer, where, row, as_chat=False):
    """A row's prompt as text. The chat template renders messages (with the row's system and tools), or text if as_chat.
    Exits if the row has neither. where: the row's name in errors."""
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, (str, list)):
        sys.exit(f'error: {where} has no "prompt" that is text or a list of messages')
    # the same rules as for the rows of training
    try:
        check_columns(row, {name: row.get(name) for name in ("prompt", "chosen", "rejected", "completion")})
        tools = read_tools(row)
        if as_chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, list):
            (messages,) = with_system(row, [[read_message(x) for x in prompt]])
            check_printed(tokenizer, messages, chat(tokenizer, messages, False, tools), tools)
            prompt = chat(tokenizer, messages, tools=tools)
        elif row.get("system") or tools:
            raise ValueError("has system or tools beside text: write the prompt as messages")
        # half of a surrogate pair is no text
        prompt.encode()
    except ValueError as error:
        sys.exit(f"error: {where} {error}")
    return prompt


# -----------------------------------------------------------------------------
# responses


def stop_tokens(model, tokenizer):
    """The ids that end a response: EOS, and those of the model's generation config, such as the end of a turn."""
    stop = model.generation_config.eos_token_id
    if not isinstance(stop, list):
        stop = [stop]
    return {tokenizer.eos_token_id, *stop} - {None}


def response_text(tokenizer, prompt, response):
    """The text that a response's ids add to that of the prompt, so that the two read as one text."""
    # decoded without its prompt, a response could begin inside a character or lose a space
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(prompt + response, skip_special_tokens=True)[len(start):]


def printable(text):
    """The text as a terminal can show it: nothing that a model writes moves the cursor, or is no character."""
    shown = ""
    for c in text:
        if c != "\n" and (c == "\ufffd" or not c.isprintable()):
            c = c.encode("unicode_escape").decode()
        shown += c
    return shown


def positions_of(model):
    """The number of tokens that a text may have at most. The attribute `positions` is set where a second model, perhaps
    with fewer of them, reads the same texts."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    return getattr(model, "positions", own)


def rope_border(model):
    """The length beyond which a text changes the frequencies (LongRoPE) of all texts in a pass, or infinity."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    borders = [float("inf")]
    # some models have parameters of their own for each type of layer
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
            borders.append(parameters["original_max_position_embeddings"])
    return min(borders)


@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens, num_samples=1, temperature=1.0, top_p=1.0, seed=0):
    """num_samples responses to each prompt (a list of token ids): lists of token ids, with EOS if it was drawn.

    A response ends at the model's last position at the latest. The same seed draws the same responses and leaves the
    caller's random state as it was. On a GPU it samples in bf16. Under FSDP all processes call it and get rank 0's.
    """
    # padding is masked, so any token will do
    stop = stop_tokens(model, tokenizer)
    pad = min(stop, default=0)
    config = GenerationConfig(do_sample=True, temperature=temperature, top_p=top_p, top_k=0, pad_token_id=pad,
                              eos_token_id=sorted(stop) or None)
    known = len(model.get_input_embeddings().weight)
    highest = max(map(max, prompts), default=0)
    if highest >= known:
        sys.exit(f"error: a prompt has the token {highest}, but the model knows only {known} tokens; leave it out")

    # every prompt num_samples times; the longest go first, so that memory runs out at once if at all
    positions = positions_of(model)
    order = list(range(len(prompts))) * num_samples
    order.sort(key=lambda i: len(prompts[i]))
    responses = [[] for _ in prompts]

    # the model's own settings, such as a repetition penalty, would fill in those that config leaves open
    own_config = model.generation_config
    model.generation_config = GenerationConfig()
    sharded = isinstance(model, FSDPModule)
    kind = model.device.type
    gpus = [model.device] if kind == "cuda" else []
    bar = tqdm(total=len(order), desc="sampling", leave=False, disable=None)
    # on a GPU in bf16, elsewhere only if the caller computes in bf16
    low = kind == "cuda" or torch.is_autocast_enabled(kind)
    with torch.random.fork_rng(gpus), torch.autocast(kind, torch.bfloat16, enabled=low):
        torch.manual_seed(seed)
        while order:
            # a batch of prompts, padded on the left
            width = len(prompts[order[-1]])
            count = max(1, min(512, 2**15 // (width + max_new_tokens)))
            # near a bound the longest prompt decides for its batch, but responses must not depend on their neighbours
            if width + max_new_tokens > min(positions, rope_border(model)):
                count = min(count, sum(len(prompts[i]) == width for i in order))
            batch, order = order[-count:], order[:-count]
            ids = [torch.tensor(prompts[i]) for i in batch]
            mask = [torch.ones_like(x) for x in ids]
            mask = pad_sequence(mask, True, 0, "left").to(model.device)
            ids = pad_sequence(ids, True, pad, "left").to(model.device)
            config.max_new_tokens = min(max_new_tokens, positions - width)
            out = model.generate(ids, attention_mask=mask, generation_config=config, synced_gpus=sharded)[:, width:]

            # one token that processes drew differently would drive their texts apart
            if sharded:
                missing = config.max_new_tokens - out.shape[1]
                out = torch.nn.functional.pad(out, (0, missing), value=pad)
                out = out.contiguous()
                dist.broadcast(out, 0)

            # after the first EOS there is only padding
            for i, new in zip(batch, out.tolist()):
                end = next((t for t, token in enumerate(new) if token in stop), len(new))
                responses[i].append(new[:end + 1])
            bar.update(len(batch))
    bar.close()
    model.generation_config = own_config
    return responses


def token_measures(logits, ref_logits, labels):
    """{name: (N,) in nats} of the tokens labels (N,) that logits and ref_logits (N, V) predict; see `measure`."""
    tokens = token_stats(logits, ref_logits, labels)
    logp = logits.float().log_softmax(-1)
    entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
    return {"entropy": entropy, "surprisal": -tokens.logp, "logratio": tokens.logratio, "kl": tokens.kl,
            "rkl": tokens.rkl}


@torch.no_grad()
def measure(model, ref, prompts, responses):
    """For each response a dict of arrays, which hold one value a token, in nats. prompts[i] and responses[i] are lists
    of token ids.

    entropy of the model; surprisal -log pi(token); logratio log pi(token) - log ref(token); kl = KL(ref || model) as in
    Eq. 10; rkl = KL(model || ref). The last three are 0 if ref is None.
    """
    # entries of the vocabulary that only one of the two models has are padding
    vocabulary = min(len(m.get_output_embeddings().weight) for m in (model, ref) if m is not None)
    lengths = [len(prompt) + len(response) - 1 for prompt, response in zip(prompts, responses)]
    border = min(rope_border(m) for m in (model, ref) if m is not None)
    order = sorted(range(len(prompts)), key=lambda i: lengths[i])
    result = [None] * len(prompts)
    with tqdm(total=len(order), desc="measuring", leave=False, disable=None) as bar:
        while order:
            # the longest first, in batches of bounded logits; padding after a text changes nothing before it
            longest = lengths[order[-1]]
            count = max(1, min(256, 2**26 // (longest * vocabulary)))
            if longest > border:
                count = 1
            batch, order = order[-count:], order[:-count]
            # the last token is only a label
            ids = [torch.tensor(prompts[i] + responses[i][:-1]) for i in batch]
            labels = [torch.tensor([-100] * (len(prompts[i]) - 1) + responses[i]) for i in batch]
            ids = pad_sequence(ids, True).to(model.device)
            labels = pad_sequence(labels, True, -100).to(model.device)

            response = labels != -100
            logits = model(ids, use_cache=False).logits[..., :vocabulary][response]
            ref_logits = logits
            if ref is not None:
                ref_logits = ref(ids, use_cache=False).logits[..., :vocabulary][response]
            # compiled even if the caller forbids it for sampling, because here it saves most of the time
            with torch.compiler.set_stance("default"):
                columns = elementwise(token_measures, logits, ref_logits, labels[response])

            # split the batch's tokens into those of each response
            for name, column in columns.items():
                values = column.cpu().split([len(responses[i]) for i in batch])
                for i, x in zip(batch, values):
                    result[i] = {**(result[i] or {}), name: x.double().numpy()}
            bar.update(len(batch))
    return result


def response_stats(measured):
    """{name: one value a response, in nats (array)} of the result of `measure`. entropy is the mean over tokens of
    -sum_v p log p (f-DPO's definition) and surprisal its Monte-Carlo form; kl and rkl are sums over tokens."""
    result = {}
    for name in ("entropy", "surprisal"):
        result[name] = np.array([tokens[name].mean() for tokens in measured])
    for name in ("kl", "rkl"):
        result[name] = np.array([tokens[name].sum() for tokens in measured])
    return result


def ratio_mean(values, weights, groups):
    """(mean, its standard error over groups) of values, one a response. weights: numbers of tokens, for a mean over
    tokens, or None; groups: numbers of prompts."""
    values = np.asarray(values)
    if weights is None:
        weights = np.ones(len(values))
    weights = np.asarray(weights)
    mean = np.average(values, weights=weights)
    # the linearized error of a ratio of sums over groups
    spread = np.bincount(groups, weights * (values - mean))
    n = len(spread)
    if n == 1:
        return float(mean), float("nan")
    variance = (spread**2).sum() * n / (n - 1)
    return float(mean), float(np.sqrt(variance) / weights.sum())


# -----------------------------------------------------------------------------
# the script; extras/show.py shares its options


def check_sampling(parser, args):
    """End the program if a number of sampling is out of range."""
    for fails, message in (
        (args.max_new_tokens < 1, "--max_new_tokens must be 1 or more"),
        (not 0 < args.temperature < float("inf"), "--temperature must be greater than 0"),
        (not 0 < args.top_p <= 1, "--top_p must be greater than 0 and at most 1"),
        (not 0 <= args.seed < 2**63, "--seed must not be negative"),
    ):
        if fails:
            parser.error(message)


def sampling_options(parser):
    """The values of the parser's options and of those that sampling takes."""
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    parser.add_argument("--ref", help="reference (empty for none); by default the one that --model was trained against")
    parser.add_argument("--prompts", default="", help=".jsonl or .txt; by default those that the run held out")
    parser.add_argument("--prompt", help="one prompt")
    parser.add_argument("--chat", action="store_true", help="render prompts that are text with the chat template, too")
    parser.add_argument("--num_prompts", type=int, default=8, help="at most this many prompts, 0 for all (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens of a response at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (%(default)s)")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus sampling (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same responses (%(default)s)")
    parser.add_argument("--device", default=DEVICES[0], choices=DEVICES, help="where to sample (%(default)s)")
    args = parse(parser)
    own = args.prompt is not None or args.prompts
    for fails, message in (
        (args.prompt is not None and args.prompts, "--prompt and --prompts exclude each other"),
        (args.chat and not own, "--chat needs --prompt or --prompts: a run has rendered its own prompts already"),
        (not own and not os.path.exists(os.path.join(args.model, "prompts.jsonl")),
         f"{args.model} is not a run that held out prompts: give --prompt or --prompts"),
        (args.num_prompts < 0, "--num_prompts must not be negative"),
    ):
        if fails:
            parser.error(message)
    check_sampling(parser, args)
    if args.ref is None:
        args.ref = reference_of(args.model)
    return args


def set_up(args):
    """(model, tokenizer, reference or None, texts of the prompts) that the options name."""
    if args.prompt is not None:
        rows = [("the prompt", {"prompt": args.prompt})]
    else:
        rows = read_prompts(args.prompts or os.path.join(args.model, "prompts.jsonl"))
    rows = rows[:args.num_prompts or None]
    model, tokenizer = load_model(args.model, args.device)
    texts = [prompt_text(tokenizer, where, row, args.chat) for where, row in rows]
    plain = any(isinstance(row, dict) and isinstance(row.get("prompt"), str) for _, row in rows)
    if tokenizer.chat_template and plain and (args.prompt or args.prompts) and not args.chat:
        print("note: prompts that are text are used as they are; --chat renders them with the model's chat template")

    ref = None
    if args.ref:
        ref = load_reference(args.ref, tokenizer, model.device)
        # both read prompts and responses
        model.positions = min(positions_of(model), positions_of(ref))
    # a prompt that comes twice is one prompt, and one that is too long does not stop the others
    texts, room = dict.fromkeys(texts), positions_of(model)
    fitting = [text for text in texts if len(encode_prompt(tokenizer, text)) < room]
    if len(fitting) < len(texts):
        print(f"note: {len(texts) - len(fitting)} of {len(texts)} prompts are left out, because they leave no room for "
              f"a response within {room} positions")
    if not fitting:
        sys.exit("error: no prompt is left")
    return model, tokenizer, ref, fitting


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--num_samples", type=int, default=1, help="responses to each prompt (%(default)s)")
    parser.add_argument("--out", default="", help="file to write or replace; by default samples.jsonl in --model")
    args = sampling_options(parser)
    if args.num_samples < 1:
        parser.error("--num_samples must be 1 or more")
    # the model of a hub id has no folder here
    folder = args.model if os.path.isdir(args.model) else "."
    out = writable(parser, args.out or os.path.join(folder, "samples.jsonl"))
    model, tokenizer, ref, texts = set_up(args)
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    # response n answers prompt index[n]
    index = np.repeat(range(len(prompts)), args.num_samples)

    # the policy is measured against its reference
    models = {"policy": (model, ref)}
    if ref is not None:
        models = {"reference": (ref, None), **models}
    rows, means = [], []
    shown = [[] for _ in texts]
    for name, (m, against) in models.items():
        drawn = generate(m, tokenizer, prompts, args.max_new_tokens, args.num_samples, args.temperature, args.top_p,
                         args.seed)
        responses = [response for group in drawn for response in group]
        stats = response_stats(measure(m, against, [prompts[i] for i in index], responses))
        # there is no divergence without a reference
        if against is None:
            stats = {key: stats[key] for key in ("entropy", "surprisal")}

        # a row for each response
        for n, i in enumerate(index):
            text = response_text(tokenizer, prompts[i], responses[n])
            numbers = {key: float(values[n]) for key, values in stats.items()}
            rows.append(dict(prompt=texts[i], model=name, response=text, tokens=len(responses[n]), **numbers))
            shown[i].append(f"  {name:9} |{printable(text)}")

        # a line for each model: means over tokens, or over responses
        lengths = np.array([len(response) for response in responses])
        line = f"{name:9} | {len(responses)} responses"
        for key, values in stats.items():
            weights = lengths if key in ("entropy", "surprisal") else None
            mean, error = ratio_mean(values, weights, index)
            line += f" | {key} {mean:.4f}"
            if len(texts) > 1:
                line += f" ± {error:.4f}"
        means.append(line)

    # the screen, then the file, which may fail
    for prompt, lines in zip(texts, shown):
        print("\n" + printable(prompt.strip()))
        print("\n".join(lines))
    print("\n" + "\n".join(means))
    write_lines(out, rows)
    print(f"entropy and surprisal in nats a token, kl and rkl in nats a response, ± standard error over {len(texts)} "
          f"prompts; wrote {out}")
