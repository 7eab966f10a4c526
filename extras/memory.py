"""Estimate the memory that a run of train.py will take, before it takes it. No weights are loaded or downloaded.

    python -m extras.memory --init_from=Qwen/Qwen2.5-1.5B                   # TDPO2 on all weights, on one GPU
    python -m extras.memory --init_from=out/hh-sft --lora_rank=16 --checkpoint_activations=True
    python -m extras.memory --init_from=EleutherAI/pythia-2.8b --method=sft --processes=8
    python -m extras.memory table                                           # write README's table of models that fit

Of the model only config.json is read. train.py's other options are accepted and change nothing, so that the options of
any run can be tried as they stand.
"""
import argparse
import copy
import logging
import math
import os
import sys

import train        # before torch, because it sets up the memory of the process
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config

import tdpo
from sample import parse

README = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "README.md")
# bytes of the largest fp32 logits that the loss holds at once on a GPU; an eighth of it elsewhere
CHUNK_BYTES = getattr(tdpo, "CHUNK_BYTES", 4096 * 50257 * 4)
# sizes of cards in GB, and the share of one that a run can count on
CARDS = (24, 48, 80)
USABLE = 0.95


# -----------------------------------------------------------------------------
# the run that is planned


def read_options(argv):
    """The planned run as an argparse.Namespace. Its `low` says that it computes in bf16."""
    parser = argparse.ArgumentParser(usage="python -m extras.memory --init_from=MODEL [--key=value ...]",
                                     description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name, default, comment, **options):
        parser.add_argument("--" + name, default=default, metavar="", help=f"{comment} [{default}]", **options)
    add("init_from", "", "the policy: a directory or hub id")
    add("ref_from", "", "the reference, if it is a different model")
    add("method", train.method, "sft has no reference; the others take the same", choices=train.CHOICES["method"])
    add("optimizer", train.optimizer, "rmsprop or adamw", choices=train.CHOICES["optimizer"])
    add("lora_rank", train.lora_rank, "rank of the adapters; 0 trains all weights", type=int)
    add("checkpoint_activations", str(train.checkpoint_activations), "compute activations twice rather than keep them",
        choices=("True", "False"))
    add("batch_size", train.batch_size, "pairs a step", type=int)
    add("micro_tokens", train.micro_tokens, "tokens a forward pass; 0 is 8192 on cuda, 1024 elsewhere", type=int)
    add("device", "cuda", "where the run will be: cuda, mps or cpu", choices=("cuda", "mps", "cpu"))
    add("dtype", train.dtype, "auto is bfloat16 on cuda, else float32", choices=train.CHOICES["dtype"])
    # these three are not train.py's
    add("processes", 1, "processes that share the model, as torchrun starts them", type=int)
    add("prompt_tokens", 170, "tokens of a prompt; by default those of a long pair of HH, where 9 of 10 are shorter",
        type=int)
    add("response_tokens", 172, "tokens of each response, likewise", type=int)

    # the other knobs of train.py do not bear on memory
    known = set(parser._option_string_actions)
    for name, value in vars(train).items():
        if type(value) in (str, int, float, bool) and "--" + name not in known and not name.startswith("_"):
            parser.add_argument("--" + name, help=argparse.SUPPRESS)
    run = parse(parser, argv)

    # what is missing, or makes no sense
    if not run.init_from:
        parser.error("which model? --init_from=DIRECTORY or a hub id")
    for name in ("batch_size", "processes", "prompt_tokens", "response_tokens"):
        if getattr(run, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    for name in ("lora_rank", "micro_tokens"):
        if getattr(run, name) < 0:
            parser.error(f"--{name} must not be negative")
    if run.lora_rank and run.processes > 1:
        parser.error("--lora_rank works in one process; leave it or --processes out")

    # as train.py settles them
    run.checkpoint_activations = run.checkpoint_activations == "True"
    if run.dtype == "auto" and run.device == "cuda":
        run.dtype = "bfloat16"
    if run.dtype == "auto":
        run.dtype = "float32"
    run.low = run.dtype == "bfloat16"
    if not run.micro_tokens and run.device == "cuda":
        run.micro_tokens = 8192
    if not run.micro_tokens:
        run.micro_tokens = 1024
    return run


def changed(run, **changes):
    """The same run with some options changed."""
    return argparse.Namespace(**{**vars(run), **changes})


def typical_example(run):
    """An example of the planned lengths. What its tokens are does not matter."""
    rejected = [3] * run.response_tokens
    if run.method == "sft":
        rejected = []
    return train.Example("", "", [1] * run.prompt_tokens, [2] * run.response_tokens, rejected)


def fullest_row(run):
    """The examples of a full pass: as many as micro_tokens or a step's batch holds, and at least one."""
    example = typical_example(run)
    count = min(run.batch_size, run.micro_tokens // train.size(example))
    return [example] * max(1, count)


# -----------------------------------------------------------------------------
# what it takes


def memory_needs(run, config, ref_config, examples):
    """{what: bytes} that a training step takes in one process of the run, whose rows hold these examples.

    config, ref_config: transformers' configurations of policy and reference; the latter is None if the reference starts
    as a copy of the policy. Models are built, and the policy's pass is run, on tensors without data."""
    with FakeTensorMode():
        model = build(config)
        if run.lora_rank:
            train.adapt(model, run.lora_rank, run.low)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)

        # RMSprop keeps one number for each weight that is trained, AdamW two
        state = trained
        if run.optimizer == "adamw":
            state = 2 * trained
        needs = {
            "weights": weight_bytes(model, run.processes),
            "gradients": trained / run.processes,
            "optimizer": state / run.processes,
            "reference": 0,
        }

        # adapters need no second model: the reference is the policy without them, unless a different one is named
        if run.method != "sft" and (ref_config or not run.lora_rank):
            needs["reference"] = weight_bytes(build_reference(run, ref_config or config), run.processes)
        needs["activations"] = activation_bytes(run, model, examples)
        needs["loss"] = loss_bytes(run, model, examples)
    return needs


def peak_bytes(needs):
    """The most that is held at once. Weights, gradients, the optimizer's state and the reference stay; the rest comes
    and goes, in a pass or in the optimizer's step, which makes one more copy of the trained weights."""
    stays = needs["weights"] + needs["gradients"] + needs["optimizer"] + needs["reference"]
    return stays + max(needs["activations"] + needs["loss"], needs["gradients"])


def build(config):
    """A model with fp32 weights. The configuration is copied, because the model writes its dtype there."""
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


def build_reference(run, config):
    """The reference. Under autocast train.py keeps its linear layers in bf16 if that loses nothing, which is so for
    weights that were saved in bf16."""
    ref = build(config)
    if run.low and config.dtype == torch.bfloat16:
        for layer in train.linear_layers(ref):
            layer.weight = torch.nn.Parameter(layer.weight.bfloat16(), requires_grad=False)
    return ref


def weight_bytes(model, processes):
    """Bytes of a model's weights in one process. FSDP spreads the blocks; what is in no block stays gathered after its
    first use, because the loss takes the output layer outside the model."""
    spread = {id(p) for block in train.blocks_of(model) for p in block.parameters()}
    count = 0
    for p in model.parameters():
        if id(p) in spread:
            count += p.nbytes / processes
        else:
            count += p.nbytes
    return count


def activation_bytes(run, model, examples):
    """Bytes that the policy's pass over a row keeps for its backward pass; 0 if they cannot be estimated."""
    model.set_attn_implementation("pair_attention")
    batch = train.collate(examples)
    if run.device == "cuda":
        # FlexAttention cannot run without data, but keeps as much as attention without a mask does
        batch["attention"] = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}

    # each storage once, and none that holds weights
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return x
    # the error that follows says enough
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16, enabled=run.low):
                train.response_states(model.base_model, model, batch)
    except Exception as error:      # models raise what they like, above all where the data choose a token's expert
        reason = str(error).split("\n")[0]
        print(f"note: the activations of {type(model).__name__} could not be estimated: {reason}", file=sys.stderr)
        return 0

    # on Linux train.py has torch take whole huge pages for large buffers on the CPU
    page = 1
    if run.device == "cpu":
        page = 2**21
    count = 0
    for storage in kept.values():
        size = storage.nbytes()
        if size >= page:
            size = math.ceil(size / page) * page
        count += size
    if not run.checkpoint_activations:
        return count

    # checkpointed, the inputs of all blocks are kept, and what one block keeps. But autocast keeps its bf16 copies of
    # all trained weights, unless FSDP gathers them in bf16, block by block
    copies = 0
    if run.low and not run.lora_rank and run.processes == 1:
        copies = sum(2 * layer.weight.numel() for layer in train.linear_layers(model))
    blocks = len(train.blocks_of(model))
    if blocks == 0:
        sys.exit(f"error: --checkpoint_activations=True: {type(model).__name__} names no blocks; leave it out")
    width = model.get_output_embeddings().weight.shape[1]
    inputs = 4 * batch["ids"].numel() * width
    return copies + max(count - copies, 0) / blocks + blocks * inputs


def loss_bytes(run, model, examples):
    """Bytes that the fused loss takes beside the hidden states."""
    # logits of policy and reference for a chunk of tokens, and the gradient of the former
    output = model.get_output_embeddings().weight
    labels = sum(len(example.chosen) + len(example.rejected) for example in examples)
    budget = CHUNK_BYTES
    if run.device != "cuda":
        budget = CHUNK_BYTES // 8
    count = 3 * min(budget, 4 * labels * len(output))

    # the output layer's gradient and a chunk's part of it, and both output layers in bf16
    if output.requires_grad:
        count += 2 * 4 * output.numel()
    if run.low:
        count += 2 * 2 * output.numel()
    return count


# -----------------------------------------------------------------------------
# what is printed


def smaller_runs(run):
    """{an option to add: the run with it} for what may take less memory."""
    found = {}
    if not run.checkpoint_activations:
        found["--checkpoint_activations=True"] = changed(run, checkpoint_activations=True)
    half = run.micro_tokens // 2
    if half >= train.size(typical_example(run)):
        found[f"--micro_tokens={half}"] = changed(run, micro_tokens=half)
    if not run.lora_rank and run.processes == 1:
        found["--lora_rank=16"] = changed(run, lora_rank=16)
    if not run.lora_rank:
        found[f"--processes={2 * run.processes}"] = changed(run, processes=2 * run.processes)
    return found


def report(run):
    """Print what the run takes, which cards hold it, and which options would take less."""
    # a hub that is not there, a name that does not exist, a model without a causal form: transformers says which
    ref_config = None
    try:
        config = AutoConfig.from_pretrained(run.init_from, trust_remote_code=False)
        if run.ref_from:
            ref_config = AutoConfig.from_pretrained(run.ref_from, trust_remote_code=False)
        examples = fullest_row(run)
        needs = memory_needs(run, config, ref_config, examples)
    except (OSError, ValueError) as error:
        sys.exit(f"error: cannot plan a run from {run.init_from}: {error}")
    peak = peak_bytes(needs)

    tokens = sum(train.size(example) for example in examples)
    print(f"{run.init_from}: {run.method}, device {run.device}, dtype {run.dtype}, processes {run.processes}; a pass "
          f"takes {len(examples)} examples, {tokens} tokens in all")
    for name, count in needs.items():
        print(f"{name:12}{count / 2**30:8.2f} GiB")
    print(f"{'at the peak':12}{peak / 2**30:8.2f} GiB in each process")
    if run.device == "cuda":
        for size in CARDS:
            verdict = "too small"
            if peak <= USABLE * size * 2**30:
                verdict = "large enough"
            print(f"a card of {size} GB is {verdict}, if {USABLE:.0%} of it is free")
    else:
        print("not counted: what Python and its libraries take")

    print("\nwhat it would take with")
    for option, smaller in smaller_runs(run).items():
        count = peak_bytes(memory_needs(smaller, config, ref_config, fullest_row(smaller)))
        print(f"{option:32}{count / 2**30:8.2f} GiB")


# -----------------------------------------------------------------------------
# README's table


def qwen(width, middle, layers, heads):
    return Qwen2Config(vocab_size=151936, hidden_size=width, intermediate_size=middle, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True)


def llama(width, middle, layers):
    return LlamaConfig(vocab_size=32000, hidden_size=width, intermediate_size=middle, num_hidden_layers=layers,
                       num_attention_heads=width // 128, tie_word_embeddings=False)


# as published; none has a dtype, so the references of full runs are in fp32, as after SFT
MODELS = {
    "0.5B (Qwen2.5)": qwen(896, 4864, 24, 14),
    "1.5B (Qwen2.5)": qwen(1536, 8960, 28, 12),
    "2.8B (Pythia)": GPTNeoXConfig(vocab_size=50304, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32,
                                   num_attention_heads=32),
    "7B (Llama 2)": llama(4096, 11008, 32),
    "13B (Llama 2)": llama(5120, 13824, 40),
}


def table_row(name):
    """What fits on each card: full training, adapters (LoRA); with a star where activations have to be checkpointed."""
    run = read_options([f"--init_from={name}"])
    cells = {size: [] for size in CARDS}
    for what, rank in (("full", 0), ("LoRA", 16)):
        for star, checkpointed in (("", False), ("*", True)):
            planned = changed(run, lora_rank=rank, checkpoint_activations=checkpointed)
            peak = peak_bytes(memory_needs(planned, MODELS[name], None, fullest_row(planned)))
            for size, cell in cells.items():
                if peak <= USABLE * size * 2**30 and what not in cell:
                    cell.append(what + star)
    columns = [", ".join(cell) or "–" for cell in cells.values()]
    return f"| {name} | {' | '.join(columns)} |"


def write_table(path=README):
    """Write the table between its two markers in README."""
    lines = ["| | " + " | ".join(f"{size} GB" for size in CARDS) + " |", "|---" * (1 + len(CARDS)) + "|"]
    lines += [table_row(name) for name in MODELS]
    with open(path, encoding="utf-8") as f:
        before, start, rest = f.read().partition("<!-- table fits -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        sys.exit(f"error: {path} has no two lines <!-- table fits --> and <!-- end -->; the table goes between them")
    with open(path, "w", encoding="utf-8") as f:
        f.write(before + start + "\n".join(lines) + "\n" + end + after)


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        write_table()
        print(f"wrote the table of models that fit to {README}")
    else:
        report(read_options(sys.argv[1:]))
