"""Sample responses from a checkpoint, beside its reference where there is one, and measure the predictive entropy.

    python sample.py --model=out/reviews-tdpo2                              # prompts, reference and reward of the model's own task
    python sample.py --model=out/hh-tdpo2 --num_samples=25                  # predictive entropy as in Table 1
    python sample.py --model=gpt2 --prompt="This film was" --temperature=0.7
    python sample.py --model=DIR --ref=DIR --prompts=questions.jsonl        # .jsonl with "prompt" (text or messages), or .txt
    python sample.py --model=DIR --format=mt_bench --prompts=question.jsonl --out=data/mt_bench/model_answer/NAME.jsonl

Every response becomes one line of a .jsonl file: prompt, model, response, tokens, score, entropy, surprisal, kl, reverse_kl.
"""
import argparse
import atexit
import datetime
import difflib
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tdpo import token_stats

if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()
if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")       # what a terminal cannot show must not end a run
DEVICES = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]      # the ones that are here, the best first


def parse(parser, argv=None):
    """argparse with one sentence an error, and a nearest name for an option that does not exist."""
    parser.error = lambda message: (print(f"error: {message}", file=sys.stderr), sys.exit(2))
    if any("\ud800" <= c <= "\udfff" for c in "".join(argv or sys.argv)):
        parser.error("the command line is not UTF-8 text")
    options, unknown = parser.parse_known_args(argv)
    for word in unknown:
        near = difflib.get_close_matches(word.split("=")[0], parser._option_string_actions, 1, 0)
        parser.error(f"unknown option {word.split('=')[0]}; did you mean {near[0]}? --help lists them all")
    return options


def writable(parser, path):
    """The path, if a file can be written there: an error before the work, not after it."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        open(path, "a").close()
        return path
    except OSError as error:
        parser.error(f"--out: {path} cannot be written: {error.strerror}; name another")


# -----------------------------------------------------------------------------
# text in: rows, pairs, token ids


def read_rows(source, split="train"):
    """[(where, row)] of a .jsonl, .json, .parquet, .csv or .txt file, or of a hub dataset's split.

    A row is a dict, or a str that says what is wrong with it; `where` names file and line. A source that cannot be read at all
    ends the program with one sentence.
    """
    kind = os.path.splitext(source)[1][1:]
    if os.path.exists(source) or kind in ("jsonl", "json", "parquet", "csv", "txt"):
        if not os.path.isfile(source):
            sys.exit(f"error: {source}: no such file")
        if os.path.getsize(source) == 0:
            sys.exit(f"error: {source} is empty")
    try:
        if kind == "json" and open(source, encoding="utf-8-sig", errors="replace").read(64).lstrip()[:1] == "[":
            return [(f"{source} entry {n}", row if isinstance(row, dict) else "is not a JSON object")
                    for n, row in enumerate(json.load(open(source, encoding="utf-8-sig")), 1)]
        if kind not in ("jsonl", "json", "txt"):
            from datasets import disable_progress_bars, load_dataset
            if not sys.stderr.isatty():
                disable_progress_bars()
            data = load_dataset(kind, data_files=glob.escape(source), split="train") if kind in ("parquet", "csv") else load_dataset(source, split=split)
            return [(f"{source} row {n}", row) for n, row in enumerate(data, 1)]
        lines = open(source, "rb")
    except Exception as error:      # datasets wraps what its readers raise: the last cause is the one that tells
        while error.__cause__:
            error = error.__cause__
        hint = "" if os.path.exists(source) else ". Without a network name a local .jsonl, .json, .parquet or .csv file"
        sys.exit(f"error: cannot read {source}: {(str(error).splitlines() or [type(error).__name__])[0]}{hint}")
    rows = []                       # line by line, so that a bad line has a number and costs only itself
    for n, line in enumerate(lines, 1):
        try:
            if line := line.decode("utf-8-sig").strip():
                row = {"prompt": line} if kind == "txt" else json.loads(line)
                rows.append((f"{source} line {n}", row if isinstance(row, dict) else "is not a JSON object"))
        except (ValueError, RecursionError) as error:
            rows.append((f"{source} line {n}", "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"is broken JSON ({getattr(error, 'msg', error)})"))
    return rows


def chat(tokenizer, messages, generation_prompt):
    """Messages through the model's chat template, as text."""
    if not tokenizer.chat_template:
        sys.exit("error: the data holds chat messages, but this model's tokenizer has no chat template; use plain strings, or a chat model")
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in messages):
        raise ValueError("has a message without a text role and content")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:      # a template raises what it likes
        raise ValueError(f"is refused by the model's chat template: {error}")


def render(row, tokenizer):
    """(prompt, chosen, rejected) as text, of plain strings, chat messages or two HH transcripts. ValueError: what is wrong with the row."""
    if isinstance(row, str):
        raise ValueError(row)
    turn, prompt, responses = "\n\nAssistant:", row.get("prompt"), [row.get("chosen"), row.get("rejected")]
    if all(isinstance(x, list) for x in responses):                     # messages; the prompt may be their common beginning
        if isinstance(prompt, str) and not any(m.get("role") == "user" for m in responses[0] if isinstance(m, dict)):
            prompt = [dict(role="user", content=prompt)]
        responses = [(prompt if isinstance(prompt, list) else []) + x for x in responses]
        shared = next((n for n, (a, b) in enumerate(zip(*responses)) if a != b), min(map(len, responses)))
        if shared == min(map(len, responses)):
            raise ValueError("has identical or empty responses")
        prompt = chat(tokenizer, responses[0][:shared], True)
        responses = [chat(tokenizer, x, False) for x in responses]
        if not all(x.startswith(prompt) for x in responses):
            raise ValueError("has responses that, in the chat template, do not continue the prompt")
        responses = [x[len(prompt):] for x in responses]                # EOS comes back when the response is tokenized
        responses = [x.rpartition(tokenizer.eos_token)[0] if tokenizer.eos_token in x else x for x in responses]
    elif prompt is None and all(isinstance(x, str) and turn in x for x in responses):
        prompt = responses[0][:responses[0].rindex(turn) + len(turn)]
        if not responses[1].startswith(prompt):
            raise ValueError("has two transcripts that differ before the last assistant turn")
        responses = [x[len(prompt):] for x in responses]
    for name, text in zip(("prompt", "chosen", "rejected"), (prompt, *responses)):
        if text is None:
            raise ValueError(f"has an empty {name!r}" if name in row else f"has no {name!r}; its columns are {', '.join(map(str, row)) or 'none'}")
        if not isinstance(text, str):
            raise ValueError(f"has {type(text).__name__} in {name!r} where text belongs")
        if not text.strip() and name != "prompt":
            raise ValueError(f"has an empty {name!r}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"has half a surrogate pair in {name!r}, which is no text")
    if responses[0] == responses[1]:
        raise ValueError("has identical responses")
    return prompt, *responses


def read_pairs(source, tokenizer, split="train", strict=False):
    """[(where, prompt, chosen, rejected)] of a source. Bad rows are counted; over 1 % of them, or one under strict, end the program."""
    pairs, bad, rows = [], [], read_rows("Anthropic/hh-rlhf" if source == "hh" else source, split)
    for where, row in tqdm(rows, desc="reading", leave=False, disable=None):
        try:
            pairs.append((where, *render(row, tokenizer)))
        except ValueError as error:
            bad.append(f"{where} {error}")
    report_bad(source, bad, len(rows), strict, "a row is a prompt, a chosen and another, rejected response, as text or as chat messages")
    if not pairs:
        sys.exit(f"error: {source} has no rows")
    return pairs


def report_bad(source, bad, total, strict, expected):
    """Count bad rows (sentences) on the screen; end the program where they are over 1 % of all, or under strict."""
    if bad and (strict or len(bad) > 0.01 * total):
        sys.exit(f"error: {bad[0]}. {len(bad)} of {total} rows are bad{'' if strict else ', more than 1 %'}: {expected}")
    if bad:
        print(f"{source}: left out {len(bad)} bad rows of {total} (--strict=True makes them fatal), the first: {bad[0]}")


def read_prompts(source, tokenizer):
    """The different prompts of a source, in order; its rows need a prompt (text or messages) and no responses."""
    prompts, bad, rows = {}, [], read_rows("Anthropic/hh-rlhf" if source == "hh" else source, "test" if source == "hh" else "train")
    for where, row in rows:
        if isinstance(row, dict) and row.get("prompt") is not None:
            stub = (lambda x: [dict(role="assistant", content=x)]) if isinstance(row["prompt"], list) else str
            row = dict(prompt=row["prompt"], chosen=stub("a"), rejected=stub("b"))
        try:
            prompts[render(row, tokenizer)[0]] = None
        except ValueError as error:
            bad.append(f"{where} {error}")
    report_bad(source, bad, len(rows), False, "a row has a prompt, as text or as chat messages")
    return list(prompts) or sys.exit(f"error: {source} has no prompts")


def encode_prompt(tokenizer, text):
    """Token ids of a prompt, with BOS where the tokenizer adds one, never EOS; an empty prompt is one BOS (or EOS) token."""
    ids = tokenizer(text, add_special_tokens=not (tokenizer.bos_token and text.startswith(tokenizer.bos_token)))["input_ids"]
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def tokenize(pairs, tokenizer, max_length, max_prompt_length, truncation):
    """([(prompt, chosen, rejected) token ids], their indices in pairs, number truncated). The prompt's tokens are the same in both.

    EOS ends each response. As in DPO, a pair over max_length first loses prompt, down to max_prompt_length, then the ends of its
    responses; one whose responses then no longer differ is left out.
    """
    examples, kept, truncated = [], [], 0
    for n, (_, prompt, *responses) in enumerate(tqdm(pairs, desc="tokenizing", leave=False, disable=None)):
        prompt = encode_prompt(tokenizer, prompt)
        responses = [tokenizer(r, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for r in responses]
        if len(prompt) + max(map(len, responses)) > max_length:
            truncated += 1
            prompt = prompt[-max_prompt_length:] if truncation == "left" else prompt[:max_prompt_length]
            responses = [r[:max_length - len(prompt)] for r in responses]
        if responses[0] != responses[1]:
            examples.append((prompt, *responses))
            kept.append(n)
    return examples, kept, truncated


def tokenize_texts(texts, tokenizer, max_length):
    """Whole texts for SFT in the same form: the first token is the prompt, nothing is rejected; EOS ends a text that is not cut."""
    ids = [(encode_prompt(tokenizer, x) + [tokenizer.eos_token_id])[:max_length] for x in tqdm(texts, desc="tokenizing", leave=False, disable=None)]
    return [(x[:1], x[1:], []) for x in ids if len(x) > 1]


# -----------------------------------------------------------------------------
# rows: several whole pairs in one row, each as [prompt | chosen | rejected], its prompt once; a row is what a forward pass takes


def size(example):
    """Tokens of an example in a row: all but the last of each response, which predict nothing."""
    return sum(map(len, example)) - sum(1 for response in example[1:] if response)


def pack(lengths, row_length):
    """Rows (lists of indices) whose lengths sum to at most row_length: first fit, longest first."""
    rows, free = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        r = next((r for r, space in enumerate(free) if space >= lengths[i]), len(rows))
        if r == len(rows):
            rows.append([])
            free.append(row_length)
        rows[r].append(i)
        free[r] -= lengths[i]
    return rows


def best_row(steps, longest, limit, world, dense):
    """The row length, a multiple of 128 up to limit, that costs least in these steps (lists of sizes) over all processes: a pass takes time of its
    own, and dense attention takes the square of the length."""
    least = -(-longest // 128) * 128
    cost = lambda n: sum(-(-len(pack(x, n)) // world) for x in steps) * (n + 256 + (n * n / 1600 if dense else 0))
    return min(range(least, max(least, limit) + 1, 128), key=cost)


def collate(examples, indices, length=0, device="cpu", attention="pairs"):
    """A row of whole pairs, padded to length, as tensors on the device: ids and position (1, L), and for the N response tokens source
    (index of the token that predicts it), labels, and, on the CPU, pair and chosen; attention holds the body's arguments for it."""
    ids, position, doc, part, source, labels, pair, chosen = ([] for _ in range(8))
    for n, i in enumerate(indices):
        prompt, last = len(examples[i][0]), len(ids) + len(examples[i][0]) - 1      # last predicts the first token of either response
        for k, tokens in enumerate(examples[i]):
            if k and tokens:
                source += [last, *range(len(ids), len(ids) + len(tokens) - 1)]
                labels += tokens
                pair += [n] * len(tokens)
                chosen += [k == 1] * len(tokens)
                tokens = tokens[:-1]
            position += range(prompt if k else 0, (prompt if k else 0) + len(tokens))
            part += [k] * len(tokens)
            doc += [n] * len(tokens)
            ids += tokens
    sizes, padding = [size(examples[i]) for i in indices], length - len(ids)
    pin = torch.device(device).type == "cuda"           # or the copy may wait for what the device is doing
    ids, position, doc, part, source, labels = (torch.tensor(x, pin_memory=pin).to(device, non_blocking=pin) for x in (
        [ids + [0] * padding], [position + [0] * padding], [doc + [-1] * padding], [part + [0] * padding], source, labels))
    return dict(ids=ids, position=position, source=source, labels=labels, pair=torch.tensor(pair), chosen=torch.tensor(chosen),
                attention=row_attention(doc, part, sizes, attention))


def attention_mask(doc, part):
    """(1, 1, L, L) bool of doc, the pair of each token, and part, 0 in a prompt, 1 in a chosen, 2 in a rejected response, each (1, L): a token
    sees itself and what is before it in its own pair: the prompt and its own response."""
    causal = torch.ones(doc.shape[1], doc.shape[1], dtype=torch.bool, device=doc.device).tril()
    visible = (part[:, None, :] == 0) | (part[:, :, None] == part[:, None, :])
    return (causal & (doc[:, :, None] == doc[:, None, :]) & visible)[:, None]


def row_attention(doc, part, sizes, how):
    """What the body takes in place of a padding mask: one for the row (dense), one for each pair (pairs), or FlexAttention's block mask (flex)."""
    if how == "dense":
        return {"attention_mask": attention_mask(doc, part)}
    if how == "flex":
        doc, part = doc[0], part[0]     # a constant index inside the mask would be a copy to the device, and a wait
        layout = create_block_mask(lambda b, h, q, k: (q >= k) & (doc[q] == doc[k]) & ((part[k] == 0) | (part[q] == part[k])), None, None,
                                   len(doc), len(doc), device=doc.device)
    else:
        visible = (attention_mask(d, p)[0, 0] for d, p in zip(doc.split(sizes, 1), part.split(sizes, 1)))
        layout = sizes, [torch.zeros(x.shape, device=x.device).masked_fill(~x, -torch.inf) for x in visible], {}
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=doc.device), "layout": layout}       # so the model makes no mask of its own


def pair_attention(module, query, key, value, attention_mask, layout=None, scaling=None, **options):
    """Attention for rows of pairs in any model that takes a registered function: (1, heads, L, D) each -> (1, L, heads, D), None.

    On a GPU FlexAttention skips the blocks that the mask leaves out. On a CPU each pair attends by itself, in plain products, which take a
    fraction of the time of torch's flash kernel on the whole row. Without packed rows it is transformers' sdpa.
    """
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ValueError("its attention has softcapping or sinks, which only its own implementation computes")
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    query, key = query.to(value.dtype), key.to(value.dtype)         # rotary embeddings leave them in fp32 under autocast
    if isinstance(layout, BlockMask):
        return flex_attention_forward(module, query, key, value, layout, scaling=scaling, **options)
    (_, heads, _, D), groups, out, (sizes, masks, ready) = query.shape, key.shape[1], [], layout
    repeats = heads // groups           # the heads that share a key and value, one under another; the first layer makes their masks
    if (value.dtype, repeats) not in ready:
        ready[value.dtype, repeats] = [mask.to(value.dtype).repeat(repeats, 1) for mask in masks]
    for q, k, v, mask in zip(*(x[0].split(sizes, 1) for x in (query, key, value)), ready[value.dtype, repeats]):
        scores = torch.baddbmm(mask, q.reshape(groups, -1, D), k.transpose(1, 2), alpha=scaling or D**-0.5)
        out.append((scores.softmax(-1) @ v).view(heads, -1, v.shape[-1]).transpose(0, 1))
    return torch.cat(out)[None], None


AttentionInterface.register("pair_attention", pair_attention)
AttentionMaskInterface.register("pair_attention", sdpa_mask)


def response_states(body, model, batch):
    """Hidden states (N, d) that predict the response tokens; where the output layer has a bias, with a column of ones."""
    out = body(input_ids=batch["ids"], position_ids=batch["position"], use_cache=False, **batch["attention"])
    hidden = out.last_hidden_state.flatten(0, 1)[batch["source"]]
    return hidden if getattr(model.get_output_embeddings(), "bias", None) is None else torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1)


def output_weight(model):
    """The output layer (V, d), its bias as one more column."""
    layer = model.get_output_embeddings()
    return layer.weight if getattr(layer, "bias", None) is None else torch.cat([layer.weight, layer.bias[:, None]], 1)


# -----------------------------------------------------------------------------
# models: load, save, sample, measure


def load_model(path, device="cpu", cls=AutoModelForCausalLM):
    """The model (fp32 weights, dropout off) and tokenizer of a local directory or hub id; never runs remote code."""
    if os.path.isdir(path):
        for what, *patterns in (("config.json", "config.json"), ("weights (model.safetensors)", "*.safetensors", "pytorch_model*.bin"),
                                ("a tokenizer (tokenizer.json)", "tokenizer.*", "vocab.*", "tokenizer_config.json")):
            if not any(glob.glob(os.path.join(glob.escape(path), p)) for p in patterns):
                sys.exit(f"error: {path} is not a complete model directory: it has no {what}; save_pretrained writes one")
    elif os.path.exists(path) or not re.fullmatch(r"(?!out/)\w[\w.-]*(/[\w.-]+)?", path):
        sys.exit(f"error: {path}: no such directory; a model is a directory that save_pretrained wrote, or a hub id")
    else:
        print(f"loading {path} from the hub or its cache", flush=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, info = cls.from_pretrained(path, trust_remote_code=False, dtype=torch.float32, output_loading_info=True)
    except Exception as error:      # OSError, ValueError, KeyError, SafetensorError, ...: every reason a model does not load
        if not os.path.isdir(path) and isinstance(error, OSError):
            sys.exit(f"error: {path} is no local directory and the hub could not be reached or does not have it. Without a network name a "
                     "directory that save_pretrained wrote, or use the embedded task: --data=reviews --init_from=scratch")
        sys.exit(f"error: cannot load {path}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    if info["missing_keys"]:
        sys.exit(f"error: {path}: the weights lack {len(info['missing_keys'])} tensors of {type(model).__name__}, {min(info['missing_keys'])} for one")
    if info["unexpected_keys"]:
        print(f"warning: {path} has {len(info['unexpected_keys'])} tensors that its config.json has no place for, {min(info['unexpected_keys'])} for one")
    if (highest := max(tokenizer.get_vocab().values())) >= (known := len(model.get_input_embeddings().weight)):
        sys.exit(f"error: {path}: its tokenizer has ids up to {highest}, its model knows {known} tokens; resize_token_embeddings, and save both again")
    return model.to(device).eval(), tokenizer


def load_reference(path, model, tokenizer):
    """The frozen reference of a policy, on its device; its tokens must be the policy's."""
    ref, ref_tokenizer = load_model(path, model.device)
    if ref_tokenizer.get_vocab() != tokenizer.get_vocab() or len(ref.get_output_embeddings().weight) != len(model.get_output_embeddings().weight):
        sys.exit(f"error: the reference {path} has another vocabulary than the policy; the KL needs the same tokens in both")
    return ref.requires_grad_(False)


def file_hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()[:16]


# -----------------------------------------------------------------------------
# many processes, by torchrun; checkpoints, the same for any number of them


def join_processes(out_dir):
    """(rank, world) of this process under torchrun, else (0, 1). From here on processes but rank 0 print nothing, and an error that nobody
    caught is shown once, by the process that meets one first, with what helps against it; the others fail for want of that one."""
    rank, world, first = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), lambda: True
    if world > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group(timeout=datetime.timedelta(days=1))     # rank 0 may sample pairs for hours
        store, key = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False), "ended" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        first = lambda: store.add(key, 1) == 1
        atexit.register(first)              # what rank 0 says as it ends (sys.exit) is said before
        if rank:
            sys.stdout = sys.stderr = open(os.devnull, "w")

    def show(kind, error, trace):
        if not first():
            os._exit(1)
        sys.stderr = sys.__stderr__
        sys.__excepthook__(kind, error, trace)
        if isinstance(error, OSError):
            print(f"error: {error}. If {out_dir} has a checkpoint, it is whole: --resume=True continues from there", file=sys.stderr)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search("out of memory|not enough memory|allocate memory|ALLOC_FAILED", str(error)):
            print("error: out of memory. Lower --micro_tokens (no result changes), then --max_length; --dtype=bfloat16 halves what a pass keeps; torchrun "
                  "spreads a model over several GPUs", file=sys.stderr)
    sys.excepthook = show
    return rank, world


def fingerprint(examples, model):
    """A short hash of examples (token ids) and, where there is one, a model's weights (every thousandth): what a resumed run must find again."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example).encode())
    for p in model.parameters() if model else ():
        digest.update(p.detach().flatten()[::1000].contiguous().float().cpu().numpy())
    return digest.hexdigest()[:16]


def from_rank_0(thing):
    """The thing (any picklable object) that rank 0 has."""
    if dist.is_initialized():
        dist.broadcast_object_list(parcel := [thing], 0)
        return parcel[0]
    return thing


def total(x):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)       # what a checkpoint holds, whatever the number of processes


def shard(model, device, compile):
    """Spread a model over all processes, block by block (FSDP2), each block compiled where asked. Rank 0 has the weights; elsewhere they are on the meta device."""
    weights, mesh = model.state_dict(), init_device_mesh(device, (dist.get_world_size(),))
    for block in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
        if compile:
            block.compile(dynamic=False)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if dist.get_rank():
        model.to_empty(device=device).tie_weights()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for buffer in model.buffers():          # rotary frequencies, say, are in no state dict
        dist.broadcast(buffer, 0)


def save(folder, model, tokenizer, optimizer, step, data=""):
    """Write the checkpoint beside the old one, then move it over file by file. The training state's name holds the hash of the weights it
    belongs to, so at every moment the folder's weights are whole and their own state lies beside them. All processes call it, rank 0 writes."""
    weights, state = get_state_dict(model, optimizer, options=FULL)
    if dist.is_initialized() and dist.get_rank():
        return
    for name, source in model.all_tied_weights_keys.items():        # gathered apart, but one tensor in the file
        weights[name] = weights[source]
    new = os.path.join(folder, ".saving")
    try:
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new, state_dict=weights, max_shard_size="1000GB")
        tokenizer.save_pretrained(new)
        path = os.path.join(folder, f"training_state-{file_hash(os.path.join(new, 'model.safetensors'))}.pt")
        torch.save({"step": step, "optimizer": state, "rng": torch.get_rng_state(), "data": data}, os.path.join(new, "state.pt"))
    except Exception as error:              # no space left, above all: safetensors and torch raise their own kinds
        shutil.rmtree(new, ignore_errors=True)
        sys.exit(f"error: step {step} could not be saved in {folder}: {str(error).splitlines()[0]}. What was saved there before is whole: make room, "
                 "and continue with --resume=True")
    for name in os.listdir(new):            # on the disk before anything is replaced, should the machine fail
        with open(os.path.join(new, name), "rb") as f:
            os.fsync(f.fileno())
    os.replace(os.path.join(new, "state.pt"), path)
    for name in sorted(os.listdir(new), reverse=True):      # the weights before config.json, which so says that they are there
        os.replace(os.path.join(new, name), os.path.join(folder, name))
    os.rmdir(new)
    for old in glob.glob(os.path.join(glob.escape(folder), "training_state-*.pt")):
        if old != path:
            os.remove(old)


def load_state(folder, model=None):
    """{"step", "optimizer", "rng", "data"} that belongs to the weights in folder; a model gets these weights, and torch the random state."""
    weights = os.path.join(folder, "model.safetensors")
    path = os.path.join(folder, f"training_state-{file_hash(weights)}.pt") if os.path.exists(weights) else ""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if type(state["step"]) is not int or state["step"] < 0 or not state["optimizer"]["state"]:
            raise ValueError
        if model is not None:
            model.load_state_dict(load_model(folder)[0].state_dict())
            torch.set_rng_state(state["rng"])
        return {name: state[name] for name in ("step", "optimizer", "rng", "data")}
    except Exception:               # missing, cut short, or no state file at all: the unpickler raises what it likes
        sys.exit(f"error: {folder} has no complete checkpoint, or its training_state file or config.json is damaged; start again with --overwrite=True")


@torch.no_grad()
def packing_error(model, examples, attention):
    """What is wrong with rows of this model under this attention; "" where they give the logits that the model gives for separate sequences.

    What a configuration tells is read there, as its effect on these examples may be small; the comparison catches what nobody knows of,
    attention that ignores a mask, say, or recurrent layers.
    """
    config, longest = model.config.get_text_config(), max(len(e[0]) + max(map(len, e[1:])) - 1 for e in examples)
    for name, harmless in (("final_logit_softcapping", (None,)), ("logit_scale", (None, 1)), ("logits_scaling", (None, 1))):
        if getattr(config, name, None) not in harmless:
            return f"its logits are changed behind the output layer ({name} = {getattr(config, name)})"
    for name in ("sliding_window", "attention_chunk_size"):
        if (getattr(config, name, None) or longest) < longest:
            return f"its {name} of {getattr(config, name)} tokens is shorter than the longest prompt and response, {longest}"
    try:
        length = 0 if attention == "pairs" else -(-sum(map(size, examples)) // 128) * 128
        hidden = response_states(model.base_model, model, collate(examples, range(len(examples)), length, model.device, attention))
        weight, n = output_weight(model), 0
        for example in examples:
            for response in filter(None, example[1:]):
                n += len(response)
                expected = model(torch.tensor([example[0] + response[:-1]], device=model.device), use_cache=False).logits[0, -1].float()
                gap = (hidden[n - 1].float() @ weight.T.float() - expected).abs().max() / expected.std().clamp(min=1e-6)
                if not gap < 1e-2:
                    return f"packed rows give other logits than separate sequences (off by {gap:.1g} standard deviations)"
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
        return str(error)
    return ""


def choose_attention(models, examples, attention):
    """That attention, or dense where one of the models [(name, model)] takes no registered function. Ends the program where neither is exact."""
    for _, model in models:
        model.set_attn_implementation("pair_attention")
    for how in dict.fromkeys((attention, "dense")):
        errors = [(name, model, error) for name, model in models if (error := packing_error(model, examples, how))]
        if not errors:
            return how
        if how != "dense":
            print(f"{errors[0][0]} does not work with attention {how} ({errors[0][2].splitlines()[0]}); trying a dense mask, which is slower")
    name, model, error = errors[0]
    sys.exit(f"error: {name} ({type(model).__name__}) cannot be trained exactly here: {error}. Scaled or softcapped logits, recurrent layers and "
             "windows shorter than max_length are not supported")


def autocast(device, dtype):
    """bf16 autocast where dtype says so, else nothing."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


@torch.no_grad()
def generate(model, tokenizer, prompts, max_new_tokens, num_samples=1, temperature=1.0, top_p=1.0, seed=0):
    """num_samples responses to each prompt (a list of token ids): lists of token ids, EOS included where it was drawn.

    A response ends at the model's last position at the latest. Same seed, same responses; the caller's random state is untouched.
    """
    stop = model.generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(do_sample=True, temperature=temperature, top_p=top_p, top_k=0, pad_token_id=pad, eos_token_id=sorted(stop))
    many = isinstance(model, FSDPModule)
    own, model.generation_config = model.generation_config, GenerationConfig()      # its repetition penalty, say, would fill what config leaves open
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if (longest := max(map(len, prompts))) >= positions:
        sys.exit(f"error: a prompt of {longest} tokens leaves no room for a response within the model's {positions} positions; shorten it")
    order = sorted((len(p), i) for i, p in enumerate(prompts) for _ in range(num_samples))
    responses = [[] for _ in prompts]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), tqdm(total=len(order), desc="sampling", leave=False, disable=None) as bar:
        torch.manual_seed(seed)
        try:
            while order:
                count = max(1, min(512, 2**15 // (order[-1][0] + max_new_tokens)))
                batch, order = order[-count:], order[:-count]           # the longest first: memory runs out at once or never
                width = batch[-1][0]
                ids = torch.tensor([[pad] * (width - n) + prompts[i] for n, i in batch], device=model.device)
                mask = torch.tensor([[0] * (width - n) + [1] * n for n, _ in batch], device=model.device)
                config.max_new_tokens = min(max_new_tokens, positions - width)
                out = model.generate(ids, attention_mask=mask, generation_config=config, synced_gpus=many)[:, width:].contiguous()
                if many:                                # processes that draw one token apart would drift further apart
                    out = torch.nn.functional.pad(out, (0, config.max_new_tokens - out.shape[1]), value=config.eos_token_id[0])
                    dist.broadcast(out, 0)
                for (_, i), new in zip(batch, out.tolist()):
                    end = next((t for t, token in enumerate(new) if token in stop), len(new))
                    responses[i].append(new[:end + 1])
                bar.update(len(batch))
        finally:
            model.generation_config = own
    return responses


@torch.no_grad()
def response_stats(model, ref, prompts, responses):
    """Per response (prompts[i], responses[i], lists of token ids), in nats: entropy, surprisal, kl, reverse_kl (lists of floats).

    entropy is the mean over response tokens of -sum_v p log p (f-DPO's definition), surprisal its Monte-Carlo form, the mean of
    -log p(token); kl and reverse_kl are the sequential KL from and to the reference (Eq. 10), sums over tokens; 0 without ref.
    """
    result = {name: [0.0] * len(prompts) for name in ("entropy", "surprisal", "kl", "reverse_kl")}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    vocab = model.get_output_embeddings().weight.shape[0]
    with tqdm(total=len(order), desc="measuring", leave=False, disable=None) as bar:
        while order:
            longest = len(prompts[order[-1]]) + len(responses[order[-1]])
            count = max(1, min(256, 2**26 // (longest * vocab)))
            batch, order = order[-count:], order[:-count]           # the largest first: memory runs out at once or never
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            real, response = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
            for row, i in enumerate(batch):
                n, m = len(prompts[i]), len(prompts[i]) + len(responses[i])
                ids[row, :m] = torch.tensor(prompts[i] + responses[i])
                real[row, :m], response[row, n:m] = 1, True
            ids, real, response = ids.to(model.device), real.to(model.device), response.to(model.device)
            z = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1][response[:, 1:]].float()
            ref_z = z if ref is None else ref(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1][response[:, 1:]].float()
            logp, labels = z.log_softmax(-1), ids[response]
            entropy = -(logp.exp() * logp.clamp(min=-1e4)).sum(-1)
            _, kl, reverse_kl = token_stats(z, ref_z, labels)
            rows, counts = response.nonzero()[:, 0], response.sum(1)
            values = torch.stack((entropy, -logp.gather(1, labels[:, None])[:, 0], kl, reverse_kl))
            sums = values.new_zeros(4, len(batch)).index_add_(1, rows, values)
            sums[:2] /= counts
            for name, row in zip(result, sums.tolist()):
                for i, x in zip(batch, row):
                    result[name][i] = x
            bar.update(len(batch))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    parser.add_argument("--ref", default="", help="reference model; default: the one the checkpoint was trained against")
    parser.add_argument("--reward", default="", help="another reward than the run's: exact, a directory or hub id")
    parser.add_argument("--prompts", default="", help="a .jsonl or .txt file of prompts; default: the model's own task's, held out where they were named")
    parser.add_argument("--format", default="samples", choices=("samples", "mt_bench", "alpaca_eval"), help="what is written: samples of reference and policy with "
                        "their entropy, KL and reward; or a chat model's answers for FastChat's judge (prompts: MT-bench's questions, both turns) or for AlpacaEval's")
    parser.add_argument("--prompt", default="", help="one prompt")
    parser.add_argument("--num_prompts", type=int, default=8, help="at most so many prompts; 0 for all (default 8)")
    parser.add_argument("--num_samples", type=int, default=1, help="responses a prompt (default 1)")
    parser.add_argument("--max_new_tokens", type=int, default=0, help="default: the task's, else 128")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus (default 0.95)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=DEVICES[0], choices=DEVICES)
    parser.add_argument("--out", default="", help="the .jsonl to write or replace; default: samples.jsonl in the model's directory")
    args = parse(parser)
    if args.format != "samples":
        parser.set_defaults(temperature=0.7, top_p=1.0, max_new_tokens=512, num_prompts=0)      # FastChat's, as a rule
        args = parse(parser)
    import eval_imdb        # here, not above: eval_imdb imports this file

    problems = [f"--{name} must be {what}" for name, what, good in (
        ("num_samples", "positive", args.num_samples > 0), ("temperature", "positive", 0 < args.temperature < float("inf")), ("top_p", "in (0, 1]", 0 < args.top_p <= 1),
        ("max_new_tokens", "0 or more", args.max_new_tokens >= 0), ("num_prompts", "0 or more", args.num_prompts >= 0), ("prompt", "alone, without --prompts", not (args.prompt and args.prompts)),
        ("seed", "between 0 and 2^63", 0 <= args.seed < 2**63)) if not good]
    run = eval_imdb.run_options(args.model)
    if not run and not args.prompt and not args.prompts:
        problems.append(f"{args.model} is not a run of train.py, so it has no prompts of its own: give --prompt or --prompts")
    if args.format != "samples" and not (args.prompts and args.out):
        problems.append(f"--format={args.format} needs --prompts and --out")
    if problems:
        parser.error("; ".join(problems))
    out = writable(parser, args.out or os.path.join(args.model if os.path.isdir(args.model) else ".", "samples.jsonl"))
    model, tokenizer = load_model(args.model, args.device)
    if args.format != "samples":
        questions, histories = [], []
        for where, row in read_rows(args.prompts)[:args.num_prompts or None]:
            turns = row if isinstance(row, str) else row.get("turns") or [row.get("instruction", row.get("prompt"))]
            if not isinstance(turns, list) or not all(isinstance(x, str) for x in turns) or args.format == "mt_bench" and "question_id" not in row:
                sys.exit(f"error: {where} {row if isinstance(row, str) else 'needs question_id and turns (mt_bench), or instruction (alpaca_eval)'}")
            questions.append((row, turns))
            histories.append([])
        for turn in range(max((len(turns) for _, turns in questions), default=0)):
            active = [h for h, (_, turns) in zip(histories, questions) if turn < len(turns)]
            for history, (_, turns) in zip(histories, questions):
                history += [dict(role="user", content=x) for x in turns[turn:turn + 1]]
            texts = [chat(tokenizer, h, True) if tokenizer.chat_template else         # without a template as in HH
                     "".join(f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}" for m in h) + "\n\nAssistant:" for h in active]
            prompts = [encode_prompt(tokenizer, text) for text in texts]
            with autocast(args.device, "bfloat16" if args.device == "cuda" else "float32"):
                drawn = generate(model, tokenizer, prompts, args.max_new_tokens, 1, args.temperature, args.top_p, args.seed + turn)
            for history, prompt, (response,) in zip(active, prompts, drawn):
                history.append(dict(role="assistant", content=eval_imdb.response_text(tokenizer, prompt, response).split("\n\nHuman:")[0].strip()))
        name, answers = os.path.splitext(os.path.basename(out))[0], [[m["content"] for m in h if m["role"] == "assistant"] for h in histories]
        with open(out, "w", encoding="utf-8") as f:
            if args.format == "alpaca_eval":        # one list
                json.dump([dict(instruction=turns[0], output=replies[0], generator=name, dataset=row.get("dataset", "")) for (row, turns), replies in zip(questions, answers)], f, indent=1)
            else:                                   # FastChat takes the model's name from the file's
                f.writelines(json.dumps(dict(question_id=row["question_id"], answer_id=uuid.uuid4().hex, model_id=name, choices=[dict(index=0, turns=replies)],
                                             tstamp=time.time())) + "\n" for (row, _), replies in zip(questions, answers))
        print(f"wrote {len(answers)} answers to {out}")
        sys.exit()
    ref_path = args.ref or (run.get("ref_from") or run.get("init_from") if run.get("method") != "sft" else "")
    ref = load_reference(ref_path, model, tokenizer) if ref_path else None
    task = run.get("data") in eval_imdb.TASKS
    own = task and not args.prompt and not args.prompts
    reward = eval_imdb.load_reward(args.reward or run["reward"], args.device) if task or args.reward else None
    texts = [args.prompt] if args.prompt else eval_imdb.task_prefixes(run, tokenizer)["test"] if own else read_prompts(
        args.prompts or run["eval_data"] or run["data"], tokenizer)
    texts = texts[:args.num_prompts or None]
    new_tokens = args.max_new_tokens or (run["max_new_tokens"] if task else 128)

    prompts = [encode_prompt(tokenizer, text) for text in texts]
    rows, table = [], []
    for name, m in (("reference", ref), ("policy", model)):
        if m is None:
            continue
        with autocast(args.device, "bfloat16" if args.device == "cuda" else "float32"):
            drawn = generate(m, tokenizer, prompts, new_tokens, args.num_samples, args.temperature, args.top_p, args.seed)
        flat = [(i, r) for i, rs in enumerate(drawn) for r in rs]
        stats = response_stats(m, None if m is ref else ref, [prompts[i] for i, _ in flat], [r for _, r in flat])
        replies = [eval_imdb.response_text(tokenizer, prompts[i], r) for i, r in flat]
        scores = reward([texts[i] + reply for (i, _), reply in zip(flat, replies)]) if reward else [None] * len(flat)
        rows += [(i, dict(prompt=texts[i], model=name, response=reply, tokens=len(flat[n][1]), score=score, **{k: v[n] for k, v in stats.items()}))
                 for n, ((i, _), reply, score) in enumerate(zip(flat, replies, scores))]
        entropy, surprisal = (np.average(stats[k], weights=[len(r) for _, r in flat]) for k in ("entropy", "surprisal"))     # means over tokens
        table.append(f"{name:9} | n {len(flat)} | entropy {entropy:.4f} | surprisal {surprisal:.4f} nats a token"
                     + (f" | reward {np.mean(scores):+.3f}" if reward else "") + (f" | kl {np.mean(stats['kl']):.3f}" if m is model and ref else ""))
    with open(out, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows)
    for i, text in enumerate(texts):
        print(f"\n{text.strip()}")
        for row in (row for k, row in rows if k == i):
            print(f"  {row['model']:9} {'' if row['score'] is None else format(row['score'], '+.2f')} |{row['response']}")
    print("\n" + "\n".join(table))
    print(f"wrote {len(rows)} responses to {out}")
