"""Estimate the memory that a run of train.py takes on a GPU. Of the model only config.json is read.

    python -m extras.memory --init_from=Qwen/Qwen2.5-1.5B                   # TDPO2 on all weights
    python -m extras.memory --init_from=out/hh-sft --lora_rank=16 --checkpoint_activations=True
    python -m extras.memory --init_from=EleutherAI/pythia-2.8b --method=sft --processes=8
    python -m extras.memory table                                           # write README's table of models that fit

The options are those of train.py that bear on memory, and the number of processes. The run computes in bf16. What CUDA
takes for itself is not counted: leave 5 % of a card free.
"""
import argparse
import copy
import sys

import train        # before torch, because it sets up the memory of the process
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Qwen2Config

from extras.compare import write_tables
from sample import parse
from tdpo import CHUNK_BYTES

# options of train.py that bear on memory
OPTIONS = ("init_from", "method", "optimizer", "lora_rank", "checkpoint_activations", "batch_size", "micro_tokens")


# -----------------------------------------------------------------------------
# the run that is planned


def read_options(argv):
    """The planned run as an argparse.Namespace: options of train.py, with its defaults, and the number of processes."""
    parser = argparse.ArgumentParser(prog="python -m extras.memory", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = train.read_knobs()
    for name in OPTIONS:
        default, choices = getattr(train, name), train.CHOICES.get(name)
        kind = type(default)
        if kind is bool:
            kind, choices = train.true_or_false, (True, False)
        parser.add_argument("--" + name, type=kind, default=default, choices=choices,
                            help=f"{comments[name][1]} [{default}]".removesuffix(" []"))
    parser.add_argument("--processes", type=int, default=1, help="processes that share the model [1]")
    run = parse(parser, argv)
    if not run.init_from or run.lora_rank < 0 or run.processes < 1:
        parser.error("--init_from must name a model, --lora_rank must not be negative, --processes must be at least 1")
    return run


def fullest_row(run):
    """The examples of a full pass: as many as micro_tokens or a step's batch holds, and at least one. They are as long
    as a long pair of HH: 9 of 10 pairs are shorter. The tokens do not matter."""
    rejected = [3] * 172
    if run.method == "sft":
        rejected = []
    example = train.Example("", "", [1] * 170, [2] * 172, rejected)
    # 0 stands for the 8192 tokens that train.py takes on a GPU
    count = min(run.batch_size, (run.micro_tokens or 8192) // train.size(example))
    return [example] * max(1, count)


# -----------------------------------------------------------------------------
# the memory that it takes


def memory_needs(run, config, examples):
    """{name: bytes} of the shares of a training step in one process, for a row that holds these examples. config is
    transformers' configuration of the policy. The models are built, and the pass is run, on tensors without data."""
    with FakeTensorMode():
        model = build(config)
        if run.lora_rank:
            train.adapt(model, run.lora_rank, low=True)
        # with adapters each process holds a whole model
        processes = 1 if run.lora_rank else run.processes
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)

        # RMSprop keeps one number for each weight that is trained, AdamW two
        state = trained
        if run.optimizer == "adamw":
            state = 2 * trained
        needs = {
            "weights": weight_bytes(model, processes),
            "gradients": trained / processes,
            "optimizer": state / processes,
            "reference": 0,
        }

        # adapters need no second model: the reference is the policy without them
        if run.method != "sft" and not run.lora_rank:
            needs["reference"] = weight_bytes(build_reference(config), processes)
        needs["activations"] = activation_bytes(run, model, examples)
        needs["loss"] = loss_bytes(model, examples)
    return needs


def peak_bytes(needs):
    """The most that is held at once. Weights, gradients, the optimizer's state and the reference stay; the rest comes
    and goes, in a pass or in the optimizer's step, which makes one more copy of the trained weights."""
    stays = needs["weights"] + needs["gradients"] + needs["optimizer"] + needs["reference"]
    return stays + max(needs["activations"] + needs["loss"], needs["gradients"])


def build(config):
    """A model with fp32 weights. The configuration is copied, because the model writes its dtype there."""
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


def build_reference(config):
    """The reference. train.py keeps its linear layers in bf16 if that loses nothing, which is so for weights that were
    saved in bf16."""
    ref = build(config)
    if config.dtype == torch.bfloat16:
        for layer in train.linear_layers(ref):
            layer.weight = torch.nn.Parameter(layer.weight.bfloat16(), requires_grad=False)
    return ref


def weight_bytes(model, processes):
    """Bytes of a model's weights in one process. FSDP spreads the blocks; everything outside them stays gathered after
    its first use, because the loss takes the output layer outside the model."""
    spread = sum(p.nbytes for block in train.blocks_of(model) for p in block.parameters())
    everything = sum(p.nbytes for p in model.parameters())
    return everything - spread + spread / processes


def activation_bytes(run, model, examples):
    """Bytes that the policy's pass over a row keeps for its backward pass."""
    model.set_attn_implementation("pair_attention")
    batch = train.collate(examples)
    # FlexAttention cannot run without data, but keeps as much as attention without a mask does
    batch["attention"] = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}

    # each storage counts once, and those of the weights not at all
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return x
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16):
                train.response_states(model.base_model, model, batch)
    except Exception as error:      # models raise what they like, above all if the data choose a token's expert
        sys.exit(f"error: the activations of {type(model).__name__} cannot be computed without data: {error}")
    count = sum(storage.nbytes() for storage in kept.values())
    if not run.checkpoint_activations:
        return count

    # checkpointed, the inputs of all blocks are kept, and what one block keeps. But autocast keeps its bf16 copies of
    # all trained weights, unless FSDP gathers them in bf16, block by block
    copies = 0
    if not run.lora_rank and run.processes == 1:
        copies = sum(2 * layer.weight.numel() for layer in train.linear_layers(model))
    blocks = len(train.blocks_of(model))
    inputs = 4 * batch["ids"].numel() * model.get_output_embeddings().weight.shape[1]
    return copies + (count - copies) / blocks + blocks * inputs


def loss_bytes(model, examples):
    """Bytes that the loss takes beside the hidden states."""
    # of a chunk of tokens the logits of policy and reference, and the gradient of the former
    output = model.get_output_embeddings().weight
    labels = sum(len(example.chosen) + len(example.rejected) for example in examples)
    count = 3 * min(CHUNK_BYTES, 4 * labels * len(output))

    # both output layers in bf16, and the output layer's gradient and a chunk's part of it
    count += 2 * 2 * output.numel()
    if output.requires_grad:
        count += 2 * 4 * output.numel()
    return count


def report(run):
    """Print the shares of the run and their sum."""
    examples = fullest_row(run)
    needs = memory_needs(run, AutoConfig.from_pretrained(run.init_from), examples)
    tokens = sum(train.size(example) for example in examples)
    print(f"{run.init_from}: in each process, with {len(examples)} examples of {tokens} tokens in a pass")
    for name, count in {**needs, "at the peak": peak_bytes(needs)}.items():
        print(f"{name:12}{count / 2**30:8.2f} GiB")


# -----------------------------------------------------------------------------
# README's table

# sizes of cards in GB, and the share of one that a run can count on
CARDS = (24, 48, 80)
USABLE = 0.95


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
    """The kinds of run that fit on each card, with a star if activations have to be checkpointed for that."""
    cells = {size: [] for size in CARDS}
    for kind, rank in (("full", 0), ("LoRA", 16)):
        for star, checkpointed in (("", False), ("*", True)):
            run = read_options([f"--init_from={name}", f"--lora_rank={rank}",
                                f"--checkpoint_activations={checkpointed}"])
            peak = peak_bytes(memory_needs(run, MODELS[name], fullest_row(run)))
            for size, cell in cells.items():
                if peak <= USABLE * size * 2**30 and kind not in cell:
                    cell.append(kind + star)
    columns = [", ".join(cell) or "–" for cell in cells.values()]
    return f"| {name} | {' | '.join(columns)} |"


def table():
    """The lines of the table."""
    lines = ["| | " + " | ".join(f"{size} GB" for size in CARDS) + " |", "|---" * (1 + len(CARDS)) + "|"]
    return lines + [table_row(name) for name in MODELS]


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        write_tables("README.md", {"fits": table()})
    else:
        report(read_options(sys.argv[1:]))
