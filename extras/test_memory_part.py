import json
import math
import os
import sys
import time
import weakref

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import train        # before torch, because it sets up the memory of the process
import numpy as np
import pytest
import torch
import transformers as hf
from pytest import approx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from extras import bench, memory

SIZES = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
GROUPS = dict(intermediate_size=48, num_key_value_heads=2)
LLAMA = hf.LlamaConfig(**SIZES, **GROUPS, tie_word_embeddings=False)


def tiny(config=LLAMA, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.set_attn_implementation("pair_attention")
    return model


def examples_of(seed=0, n=5, V=61):
    """n pairs of random tokens, 2 to 8 in each part."""
    rng = np.random.default_rng(seed)
    return [train.Example("", "", *[rng.integers(0, V, k).tolist() for k in rng.integers(2, 9, 3)]) for _ in range(n)]


def planned(*argv, **changes):
    return memory.changed(memory.read_options(["--init_from=x", *argv]), **changes)


# ---------------------------------------------------------------------------------------------------------------------
# memory.py


def kept_by(model, examples, low, block=None):
    """Sizes of the storages that a real pass, or one block in it, keeps for its backward pass, weights left out."""
    kept = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    module = block or model
    module.register_forward_pre_hook(lambda *args: hooks.__enter__())
    module.register_forward_hook(lambda *args: hooks.__exit__())
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        if block:
            train.response_states(model.base_model, model, train.collate(examples))
        else:
            hooks.__enter__()
            train.response_states(model.base_model, model, train.collate(examples))
            hooks.__exit__()
    return [x.nbytes() for x in kept.values()]


def in_pages(sizes):
    """Their sum, where large ones take whole huge pages."""
    return sum(math.ceil(n / 2**21) * 2**21 if n >= 2**21 else n for n in sizes)


@pytest.mark.parametrize("rank, low", [(0, False), (0, True), (3, True)])
def test_memory_is_counted_before_it_is_taken(rank, low):
    """What the pass of a step keeps, counted without data, is what the real one keeps."""
    model = tiny()
    if rank:
        train.adapt(model, rank, low)
    # the last pair's scores are larger than a huge page
    examples = examples_of() + [train.Example("", "", [1] * 100, [2] * 301, [3] * 303)]
    run = planned(device="cpu", low=low, optimizer="adamw", lora_rank=rank)
    needs = memory.memory_needs(run, LLAMA, LLAMA, examples)
    sizes = kept_by(model, examples, low)
    assert max(sizes) > 2**21 and needs["activations"] == approx(in_pages(sizes), rel=0.02)
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert needs["gradients"] == trained and needs["optimizer"] == 2 * trained
    assert needs["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert needs["reference"] == 4 * tiny().num_parameters()
    labels = sum(len(e.chosen) + len(e.rejected) for e in examples)
    assert needs["loss"] == 61 * (12 * labels + 32 * (8 * (rank == 0) + 4 * low))
    assert memory.peak_bytes(needs) == sum(needs.values())

    # checkpointed, what one block keeps and the inputs of both; and without a reference of its own
    less = memory.memory_needs(memory.changed(run, checkpoint_activations=True), LLAMA, None, examples)
    one = kept_by(model, examples, low, train.blocks_of(model)[1])
    inputs = 2 * 4 * 32 * sum(map(train.size, examples))
    assert less["activations"] == approx(in_pages(one) + inputs, rel=0.1)
    assert (less["reference"] == 0) == (rank > 0)

    # two processes share what stays, but for embeddings, output layer and last norm, which stay gathered
    half = memory.memory_needs(memory.changed(run, processes=2), LLAMA, LLAMA, examples)
    outside = sum(p.nbytes for m in (model.model.embed_tokens, model.lm_head, model.model.norm) for p in m.parameters())
    assert half["loss"] == needs["loss"]
    assert all(half[name] == needs[name] / 2 for name in ("gradients", "optimizer"))
    assert all(half[name] == (needs[name] + outside) / 2 for name in ("weights", "reference"))

    # FlexAttention keeps no scores, so its passes grow with their tokens
    rows = [10 * examples_of()[:n] for n in (1, 2)]
    a, b = [memory.activation_bytes(memory.changed(run, device="cuda"), model, row) for row in rows]
    sizes = [sum(map(train.size, row)) for row in rows]
    assert low or b / a == approx(sizes[1] / sizes[0], rel=0.05)


class Rounded(TorchDispatchMode):
    """Remembers what was rounded to bf16, as long as it lives."""
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.found.append((weakref.ref(out.untyped_storage()), args[0].data_ptr(), out.nbytes))
        return out


@pytest.mark.parametrize("rank", [0, 3])
def test_checkpointed_memory_counts_the_weights_that_autocast_rounds(rank):
    model = tiny()
    if rank:
        train.adapt(model, rank, low=True)
    layers = {m.weight.data_ptr(): m.weight.numel() for m in train.linear_layers(model)}
    train.checkpoint_blocks(model)
    with torch.autocast("cpu", torch.bfloat16):
        with Rounded() as rounded:
            states = train.response_states(model.base_model, model, train.collate(examples_of()))
        alive = sum(n for storage, source, n in rounded.found if storage() is not None and source in layers)
    assert alive == (0 if rank else 2 * sum(layers.values())) and states.requires_grad
    found = {}
    for processes in (1, 2):
        for checkpointed in (False, True):
            run = planned(lora_rank=rank, checkpoint_activations=checkpointed, processes=processes)
            needs = memory.memory_needs(run, LLAMA, None, examples_of())
            found[processes, checkpointed] = needs["activations"]
    inputs = 2 * 4 * 32 * sum(map(train.size, examples_of()))
    assert found[1, True] == approx((found[1, False] - alive) / 2 + alive + inputs)
    # FSDP gathers them in bf16, a block at a time
    assert found[2, True] == approx(found[2, False] / 2 + inputs)


def test_a_reference_that_was_saved_in_bf16_stays_so():
    low = hf.LlamaConfig(**SIZES, **GROUPS, tie_word_embeddings=False, dtype="bfloat16")
    layers = sum(layer.weight.numel() for layer in train.linear_layers(tiny()))
    for run, config, saved in ((planned(), LLAMA, 0), (planned(), low, 2), (planned("--dtype=float32"), low, 0)):
        needs = memory.memory_needs(run, config, None, examples_of())
        assert needs["weights"] - needs["reference"] == saved * layers
    assert memory.memory_needs(planned("--method=sft"), low, None, examples_of())["reference"] == 0


def test_a_row_is_as_full_as_a_pass_or_a_step():
    for argv, count in (([], 16), (["--micro_tokens=100"], 1), (["--batch_size=4"], 4), (["--device=cpu"], 2)):
        examples = memory.fullest_row(planned(*argv))
        assert len(examples) == count and train.size(examples[0]) == 512
    (example,) = set(map(train.size, memory.fullest_row(planned("--method=sft"))))
    assert example == 170 + 171


def test_options_that_take_less_are_those_that_are_not_on():
    helps = ["--checkpoint_activations=True", "--micro_tokens=4096", "--lora_rank=16", "--processes=2"]
    for argv, left in (([], helps), (["--lora_rank=16"], helps[:2]), (["--checkpoint_activations=True"], helps[1:]),
                       (["--micro_tokens=600"], [helps[0], *helps[2:]]),
                       (["--processes=2"], [*helps[:2], "--processes=4"])):
        run = planned(*argv)
        smaller = memory.smaller_runs(run)
        assert list(smaller) == left
        for option, other in smaller.items():
            assert planned(*argv, option) == other
    run = planned()
    whole = memory.peak_bytes(memory.memory_needs(run, LLAMA, None, memory.fullest_row(run)))
    for option, other in memory.smaller_runs(run).items():
        assert memory.peak_bytes(memory.memory_needs(other, LLAMA, None, memory.fullest_row(other))) < whole, option


def test_a_run_is_reported_from_its_configuration(tmp_path, capsys):
    LLAMA.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]
    # options that do not bear on memory are those of a run, too
    memory.report(memory.read_options([f"--init_from={tmp_path}", "--alpha=0.3", "--data", "hh"]))
    out = capsys.readouterr().out
    assert "16 examples, 8192 tokens" in out and out.count("large enough") == 3
    assert all(f"\n{name} " in out for name in ("weights", "reference", "activations", "loss", "at the peak"))
    for argv, message in ((["--init_from=x", "--lora_rnk=3"], "did you mean --lora_rank"), ([], "which model?"),
                          (["--init_from=x", "--processes=0"], "must be 1 or more"),
                          (["--init_from=x", "--lora_rank=2", "--processes=2"], "works in one process")):
        with pytest.raises(SystemExit):
            memory.read_options(argv)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="cannot plan a run from nowhere"):
        memory.report(memory.read_options(["--init_from=nowhere"]))


def test_activations_that_depend_on_the_data_are_not_estimated(capsys):
    experts = hf.Qwen3MoeConfig(**SIZES, **GROUPS, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    needs = memory.memory_needs(planned(), experts, None, examples_of())
    assert needs["activations"] == 0 and "Qwen3MoeForCausalLM could not be estimated" in capsys.readouterr().err


def test_the_table_of_models_that_fit_is_computed(tmp_path, monkeypatch):
    with open(memory.README, encoding="utf-8") as f:
        readme = f.read()
    table = readme.partition("<!-- table fits -->\n")[2].partition("<!-- end -->")[0].splitlines()
    assert memory.table_row("1.5B (Qwen2.5)") in table
    # the script writes between the markers and leaves the rest
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table[2:]}
    assert list(rows) == list(memory.MODELS)
    monkeypatch.setattr(memory, "table_row", lambda name: rows[name])
    copy = tmp_path / "README.md"
    copy.write_text(readme.replace(rows["13B (Llama 2)"], "| stale |"), encoding="utf-8")
    memory.write_table(str(copy))
    assert copy.read_text(encoding="utf-8") == readme
    copy.write_text("no markers")
    with pytest.raises(SystemExit, match="table fits"):
        memory.write_table(str(copy))


# ---------------------------------------------------------------------------------------------------------------------
# bench.py


def test_the_forms_of_the_loss_layer_are_the_same_loss():
    case = bench.loss_case(256, 50, 8, 64, "cpu")
    losses, grads = {}, {}
    for form in ("fused", "unfused"):
        losses[form] = bench.FORMS[form](*case)
        grads[form] = torch.autograd.grad(losses[form], case[:2])
    assert losses["fused"].item() == approx(losses["unfused"].item(), rel=1e-5) and losses["fused"] != math.log(2)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads.values()))
    # whole pairs of two responses each, the long one too
    for response, pairs in ((64, 2), (128, 1)):
        *_, pair, chosen = bench.loss_case(256, 50, 8, response, "cpu")
        assert pair.max() + 1 == pairs and chosen.sum() == 128
        assert torch.bincount(2 * pair + chosen).tolist() == [response] * 2 * pairs
    for form in bench.FORMS:
        found = bench.bench_loss(form, 256, 50, 8)
        assert found["seconds"] > 0 and found["tflops"] > 0 and found["gib"] >= 0


def test_the_loss_layer_is_shown_beside_its_products_the_naive_form_and_a_long_pair(monkeypatch, capsys):
    measured = {("products", 64): (2.0, 1.0), ("fused", 64): (3.0, 1.0), ("unfused", 64): (4.0, 8.0),
                ("fused", 4096): (3.0, 1.5)}

    def apart(measure, form, N, V, d, response=64):
        assert measure is bench.bench_loss
        seconds, gib = measured[form, response]
        return {"seconds": seconds, "tflops": 1.0, "gib": gib}
    monkeypatch.setattr(bench, "apart", apart)
    bench.bench_layer()
    out = capsys.readouterr().out
    assert "| 4096 | 50257 | 768 | unfused | 4 | 1 | 8 |" in out
    assert "fused: 1.50 times the seconds of its products, 0.125 of the unfused" in out
    assert "one long pair takes 1.500 GiB extra, 64 short pairs 1.000\n" in out
    assert "takes 1.50 times as much" in out


def fails():
    raise ValueError("it failed")


def leaves():
    os._exit(3)


def sleeps():
    time.sleep(60)


def test_a_measurement_that_fails_says_why():
    with pytest.raises(RuntimeError, match="it failed"):
        bench.apart(fails)
    with pytest.raises(RuntimeError, match="leaves died with exit code 3"):
        bench.apart(leaves)
    with pytest.raises(TimeoutError, match="sleeps did not end"):
        bench.apart(sleeps, seconds=1)


def test_the_day_a_gpu_is_there_works_at_toy_sizes(tmp_path):
    found = bench.gpu_day(str(tmp_path / "day"), toy=True)
    assert not [name for name, values in found.items() if "failed" in values], found
    # a GPU computes in bf16
    limit = 1e-2 if torch.cuda.is_available() else 1e-4
    assert 0 < found["toy, rank 0, not compiled"]["difference"] < limit
    assert found["toy, rank 0, checkpointed"]["difference"] < limit
    assert found["toy, rank 16"]["pairs_per_s"] > 0 and found["loss layer, fused, V 2048"]["of products"] > 0
    assert len(found["profile"]["shares"]) == 5 and 0 < sum(found["profile"]["shares"].values()) <= 1
    lines = (tmp_path / "day" / "gpu.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) >= 2 + 2 + 2 + 2 and len({line.count("|") for line in table}) == 1
    (fused,) = [line for line in table if "fused" in line]
    assert "under the goal of 500" in fused
    assert sum(" of a step: " in line for line in lines) == 5
    # what was measured is not measured again, and what a different card has measured is not taken for this one's
    assert bench.gpu_day(str(tmp_path / "day"), toy=True) == found
    found["device"]["card"] = "another"
    (tmp_path / "day" / "gpu.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit, match="another"):
        bench.gpu_day(str(tmp_path / "day"), toy=True)


def test_a_gpu_day_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "MINUTES", 0)
    found = bench.gpu_day(str(tmp_path / "day"), toy=True)
    assert len(found) > 5 and all("not reached" in x["failed"] for name, x in found.items() if name != "device")


def test_a_gpu_day_compares_with_trl_and_says_what_falls_short():
    found = {"device": dict(card="a card"), "x, rank 0": dict(pairs_per_s=8.0, mfu=0.6, losses=[1.0, 2.0]),
             "x, rank 0, TRL": dict(pairs_per_s=4.0), "x, rank 16": dict(failed="a | b"),
             "x, rank 0, not compiled": dict(pairs_per_s=1.0, mfu=0.4, losses=[1.0, 2.02])}
    bench.compare_items(found, ["x"], ())
    assert found["x, rank 0"]["ratio"] == 2
    assert found["x, rank 0, not compiled"]["difference"] == approx(0.02 / 2.02)
    card, _, _, first, trl, failed, last = bench.gpu_table(found)
    assert "goal of 3 |" in first and "goal of 0.5" not in first and "goal of 0.5" in last
    assert "goal" not in trl and "a / b" in failed
