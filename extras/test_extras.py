"""Tests of extras/: python -m pytest -q extras"""
import glob
import html
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import types

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train        # before torch, because it sets up the memory of the process
import numpy as np
import pytest
import torch
import transformers as hf
from pytest import approx

import eval_imdb
from extras import bench, compare, judge, memory, show
from test_tdpo import HERE, Run, bytes_tokenizer, lines_of, says, text_of, write_lines

SCRIPTS = [os.path.basename(path)[:-3] for path in glob.glob(f"{HERE}/extras/*.py") if "test_" not in path]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_help(name):
    out = says(0, r"usage: python -m extras\." + name, f"extras/{name}.py", "--help")
    assert f"python -m extras.{name} " in out.split("\n", 2)[2]


# ---------------------------------------------------------------------------------------------------------------------
# memory.py

SIZES = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
             intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=False)
LLAMA = hf.LlamaConfig(**SIZES)


def planned(*argv):
    return memory.read_options(["--init_from=x", *argv])


def kept_by(model, examples, module):
    """Bytes that a real pass of the model keeps for its backward pass while it is in the module, weights left out."""
    batch, kept = train.collate(examples), {}
    batch["attention"] = {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    handles = [module.register_forward_pre_hook(lambda *args: hooks.__enter__()),
               module.register_forward_hook(lambda *args: hooks.__exit__())]
    with torch.autocast("cpu", torch.bfloat16):
        train.response_states(model.base_model, model, batch)
    for handle in handles:
        handle.remove()
    return sum(x.nbytes() for x in kept.values())


@pytest.mark.parametrize("rank", [0, 3])
def test_memory_is_counted_before_it_is_taken(rank):
    """The bytes that a pass keeps, counted without data, are those of a real one."""
    model = memory.build(LLAMA)
    model.set_attn_implementation("pair_attention")
    if rank:
        train.adapt(model, rank, True)
    rng = np.random.default_rng(0)
    examples = [train.Example("", "", *[rng.integers(0, 61, n).tolist() for n in (9, 30, 41)]) for _ in range(5)]
    adapters = f"--lora_rank={rank}"
    needs = memory.memory_needs(planned(adapters, "--optimizer=adamw"), LLAMA, examples)
    assert needs["activations"] == approx(kept_by(model, examples, model.base_model), rel=0.02)
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert needs["gradients"] == trained and needs["optimizer"] == 2 * trained
    assert needs["weights"] == sum(p.nbytes for p in model.parameters())
    # adapters have no second model
    full = 4 * sum(p.numel() for p in memory.build(LLAMA).parameters())
    assert needs["reference"] == (0 if rank else full)
    assert needs["loss"] == 61 * (12 * 5 * 71 + 32 * (4 + 8 * (rank == 0)))
    assert memory.peak_bytes(needs) == sum(needs.values())

    # checkpointed: the inputs of both blocks, what one of them keeps, and the weights that autocast has rounded
    less = memory.memory_needs(planned(adapters, "--checkpoint_activations=True"), LLAMA, examples)
    rounded = 0 if rank else 2 * sum(layer.weight.numel() for layer in train.linear_layers(model))
    block = kept_by(model, examples, train.blocks_of(model)[1]) - rounded / 2
    inputs = 2 * 4 * 32 * sum(map(train.size, examples))
    assert less["activations"] == approx(block + inputs + rounded, rel=0.1)

    # two processes share what stays, but for embeddings, output layer and last norm, which stay gathered
    half = memory.memory_needs(planned(adapters, "--processes=2"), LLAMA, examples)
    outside = sum(p.nbytes for m in (model.model.embed_tokens, model.lm_head, model.model.norm) for p in m.parameters())
    assert half["gradients"] == trained / 2 and half["weights"] == (needs["weights"] + outside) / 2


def test_a_row_is_as_full_as_a_pass_or_a_step_and_its_logits_have_a_bound():
    for argv, count in (([], 16), (["--micro_tokens=100"], 1), (["--batch_size=4"], 4)):
        examples = memory.fullest_row(planned(*argv))
        assert len(examples) == count and train.size(examples[0]) == 512
    assert train.size(memory.fullest_row(planned("--method=sft"))[0]) == 170 + 171
    model = memory.build(LLAMA)
    found = [memory.loss_bytes(model, n * memory.fullest_row(planned())) for n in (1, 10**3, 10**4)]
    assert found[0] < found[1] == found[2] == approx(3 * 2**29, rel=1e-3)


def test_a_reference_that_was_saved_in_bf16_stays_so():
    low = hf.LlamaConfig(**SIZES, dtype="bfloat16")
    needs = memory.memory_needs(planned(), low, memory.fullest_row(planned()))
    layers = sum(layer.weight.numel() for layer in train.linear_layers(memory.build(LLAMA)))
    assert needs["weights"] - needs["reference"] == 2 * layers
    assert memory.memory_needs(planned("--method=sft"), low, memory.fullest_row(planned()))["reference"] == 0


def test_a_run_is_reported_from_its_configuration(tmp_path, capsys):
    LLAMA.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]
    memory.report(memory.read_options([f"--init_from={tmp_path}"]))
    out = capsys.readouterr().out
    sizes = [float(x) for x in re.findall(r"(\S+) GiB", out)]
    assert "16 examples of 8192 tokens" in out and len(sizes) == 7 and sum(sizes[:-1]) == approx(sizes[-1], abs=0.04)
    # a choice that depends on the data
    hf.Qwen3MoeConfig(**SIZES, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="Qwen3MoeForCausalLM cannot be computed without data"):
        memory.report(memory.read_options([f"--init_from={tmp_path}"]))


def test_the_table_of_models_that_fit_is_computed(tmp_path, monkeypatch):
    readme = text_of("README.md")
    rows = readme.partition("<!-- table fits -->\n")[2].partition("<!-- end -->")[0].splitlines()[2:]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in rows}
    assert list(rows) == list(memory.MODELS)
    assert memory.table_row("0.5B (Qwen2.5)") == rows["0.5B (Qwen2.5)"]
    # the script writes between the markers and leaves the rest
    monkeypatch.setattr(memory, "table_row", lambda name: rows[name])
    copy = tmp_path / "README.md"
    copy.write_text(readme.replace(rows["13B (Llama 2)"], "| stale |"), encoding="utf-8")
    memory.write_table(str(copy))
    assert copy.read_text(encoding="utf-8") == readme


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
        assert torch.bincount(2 * pair + chosen).tolist() == [response] * 2 * pairs


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
    assert "one long pair takes 1.500 GiB extra, 64 short pairs 1.000, which is 1.50 times as much" in out


def test_the_day_on_a_gpu_works_at_toy_sizes_and_continues(tmp_path, monkeypatch, capsys):
    calls = []

    def in_fork(command, **options):
        """Faster than a new process that imports everything. The first one fails."""
        assert command[:3] == [sys.executable, "-m", "extras.bench"]
        calls.append(command)
        code, out = 1, "it failed"
        if len(calls) > 1:
            code, out = Run("extras/bench.py", *command[3:]).end()
        return types.SimpleNamespace(returncode=code, stdout=out, stderr="")
    monkeypatch.setattr(bench.subprocess, "run", in_fork)
    # TRL is seldom installed, and takes its time
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    found = bench.gpu_day(str(tmp_path), toy=True)
    failed = {name: values["failed"] for name, values in found.items() if "failed" in values}
    assert failed == {"products, V 2048": "exit code 1: it failed"}
    assert found["toy, rank 0"]["pairs_per_s"] > 0 and found["fused, V 2048"]["tflops"] > 0
    # started again, only that one runs; the two ways do not change the losses
    count = len(calls)
    capsys.readouterr()
    again = bench.gpu_day(str(tmp_path), toy=True)
    assert len(calls) == count + 1 and again["products, V 2048"].pop("tflops") > 0
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[0] == "|"]
    gaps = [float(cells[-1]) for cells in table if re.search("compiled|checkpointed", cells[0])]
    assert len(table) == 2 + len(found) and len(gaps) == 2 and max(gaps) < (1e-2 if torch.cuda.is_available() else 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# show.py and judge.py


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder with ref, an untrained model, tuned, a run against it with prompts that it held out, and chat, the
    untrained model with a chat template."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("ref", "tuned")):
        model, tokenizer = eval_imdb.scratch_model(seed)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    write_lines("tuned/options.json", [dict(method="tdpo2", init_from="ref", ref_from="")])
    write_lines("tuned/prompts.jsonl", [dict(prompt=text) for text in ("the plot", "i saw this", "a dull")])
    shutil.copytree("ref", "chat")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained("chat")


def test_each_token_has_its_text_and_its_share():
    """Of letters that are several tokens, the last shows them; shades are shares, and nothing is lost or executed."""
    letters = bytes_tokenizer()
    prompt, response = letters("né")["input_ids"], letters("ö<b>\n€")["input_ids"]
    texts = show.token_texts(letters, prompt, response)
    assert texts == ["", "ö", "<", "b", ">", "\n", "", "", "€"]
    values = np.array([3.0, 1, 0, 2, 1, 0.1, -2, -1, 0])
    spans = show.shaded(texts, values, "logratio")
    page = show.written(spans, show.on_page)
    assert re.sub(r"<.*?>", "", page) == "ö&lt;b&gt;\n€ [logratio 4.10 nats]"
    assert [float(x) for x in re.findall(r'title="(\S+) nats"', page)] == [4, 0, 2, 1, 0.1, -3]
    colors = [[int(x) for x in color] for color in re.findall(r"rgb\((\d+),(\d+),(\d+)\)", page)]
    assert colors[1] == [255, 255, 255] == colors[4] and colors[5][2] > colors[5][0] and colors[0][0] > colors[0][2]
    # 4 of 10.1 are one shade darker than 2 are, which are darker than 1
    assert colors[0][2] < colors[2][2] < colors[3][2] < 255
    # what a model writes does not move the terminal's cursor
    line = show.on_terminal(show.Span("a\rb\x1b[2J", (255, 255, 255)))
    assert "\r" not in line and line.count("\x1b") == 2


def test_show_shades_the_responses_that_sample_draws(models):
    """Both draw the same ones from a seed: their text is the response, and their sums are what sample.py measured."""
    options = ["--model=tuned", "--num_prompts=2", "--max_new_tokens=20"]
    says(0, "over 2 prompts", "sample.py", *options, "--out=rows.jsonl")
    rows = lines_of("rows.jsonl")
    out = says(0, "", "extras/show.py", *options, "--show=logratio", "--html=new/page.html")
    page = text_of(os.path.abspath("new/page.html"))
    # the reference's responses come first in the file, and on the page the two responses to a prompt stand together
    paragraphs = [re.sub("<.*?>", "", x) for x in re.findall("<p>.*?</p>", page, re.S)]
    lines = [re.sub(r"\033\[.*?m", "", x) for x in re.findall(r"\n  (?:reference|policy) .*", out)]
    for row, n in zip(rows, (0, 2, 1, 3)):
        found = html.unescape(paragraphs[n]).removeprefix(row["model"] + " ")
        for text in (found, lines[n].split("|", 1)[1]):
            assert text.replace("<eos>", "").split(" [logratio ")[0].strip() == row["response"].strip()
            assert ("[logratio " in text) == (row["model"] == "policy")
    # the page loads nothing, and says what its colors mean
    assert not re.search("http|src=|href=|@import|url", page)
    assert "its response's logratio (absolute values" in html.unescape(page)
    out = says(0, "", "extras/show.py", *options)
    sums = [float(x) for x in re.findall(r"\[kl (\S+) nats\]", out)]
    assert sums == approx([row["kl"] for row in rows[2:]], abs=0.006)
    # a model that is no run has no reference, and needs none for its own surprisal
    ask = ["extras/show.py", "--model=ref", "--prompt=the plot", "--max_new_tokens=5"]
    says(2, "--show=kl compares with a reference", *ask)
    says(0, "surprisal", *ask, "--show=surprisal")


def test_show_and_judge_leave_no_output_when_their_input_is_bad(models):
    write_lines("broken.jsonl", ["{"])
    write_lines("mine", ["mine"])
    for option, *script in (("--html", "extras/show.py", "--show=surprisal"),
                            ("--out", "extras/judge.py", "--format=mt_bench")):
        for out in ("new/folder/x", "mine"):
            says(1, "cannot read broken.jsonl, line 1", *script, "--model=ref", "--prompts=broken.jsonl", f"{option}={out}")
    assert not os.path.exists("new") and text_of(os.path.abspath("mine")) == "mine\n"


def test_answers_have_the_form_that_judges_read(models):
    questions = [dict(question_id=n, category="x", turns=["the plot", "the music"][:n]) for n in (1, 2)]
    write_lines("question.jsonl", [*questions, dict(question_id=3, turns=["the " * 200, "the music"])])
    write_lines("list.json", [json.dumps([dict(instruction="the plot"), dict(instruction="the music")])])
    ask = ["extras/judge.py", "--model=chat", "--max_new_tokens=20"]
    bench = [*ask, "--format=mt_bench", "--out=answers/tiny.jsonl"]
    out = says(0, "wrote 3 answers", *bench, "--prompts=question.jsonl")
    assert "question 3 is too long in turn 1: its answer is empty" in out
    says(1, "row 1 is not a JSON object with question_id and turns", *bench, "--prompts=list.json")
    for found, turns in zip(lines_of("answers/tiny.jsonl"), (1, 2, 2), strict=True):
        replies = found["choices"][0]["turns"]
        assert found["model_id"] == "tiny" and len(replies) == turns
        assert (replies[0] == "") == (found["question_id"] == 3)
    says(0, "wrote 2 answers", *ask, "--format=alpaca_eval", "--prompts=list.json", "--out=tiny.json")
    found = json.load(open("tiny.json"))
    assert [(x["generator"], x["instruction"]) for x in found] == [("tiny", "the plot"), ("tiny", "the music")]
    assert all(answer["output"] for answer in found)


def test_a_second_turn_follows_the_models_own_answer(models, monkeypatch):
    asked = []

    def generate(model, tokenizer, prompts, *_):
        asked.append([" ".join(tokenizer.decode(prompt).split()) for prompt in prompts])
        return [[tokenizer("was dull")["input_ids"]] for _ in prompts]
    monkeypatch.setattr(judge, "generate", generate)
    model, tokenizer = judge.load_model("chat")
    args = types.SimpleNamespace(max_new_tokens=5, temperature=1.0, top_p=1.0, seed=0)
    replies = judge.answer(model, tokenizer, [["the plot"], ["the music", "i saw"]], args)
    assert replies == [["was dull"], ["was dull", "was dull"]]
    assert asked == [["the plot", "the music"], ["the music was dull i saw"]]


# ---------------------------------------------------------------------------------------------------------------------
# check.py, second.py and study.sh


def test_samples_are_checked_by_hand_and_scored_by_a_second_classifier(models):
    """The first script shares no code with the project, and the second learns moods from other reviews."""
    says(0, "saved run", "train.py", "--init_from=ref", "--out_dir=run", "--train_prefixes=48", "--eval_prefixes=24",
         "--max_steps=4", "--eval_interval=2", "--learning_rate=1e-3", "--warmup_steps=1", "--max_new_tokens=40")
    out = says(0, "largest differences", "extras/check.py", "run")
    assert max(map(float, re.findall(r": '(\S+)'", out.splitlines()[-1]))) < 2e-4 and out.count("run {") == 5
    says(0, "wrote", "extras/compare.py", "--runs=run", "--out=first")

    from datasets import Dataset
    rng, rows = random.Random(0), []
    for n in range(600):
        text = eval_imdb.write_review(rng)
        (reward,) = eval_imdb.exact_reward([text])
        rows.append(dict(text=text, label=int(reward > 0), split="train" if n < 500 else "test"))
    Dataset.from_list(rows).to_parquet("moods.parquet")
    out = says(0, "of 100 test reviews", "extras/second.py", "moods.parquet", "first.json", "second.json")
    assert float(re.search(r"accuracy (\S+)", out)[1]) > 0.7 and float(out.split()[-1]) > 0.4
    (first,), (second,) = json.load(open("first.json")), json.load(open("second.json"))
    for a, b in zip(first["evals"], second["evals"]):
        assert a["rkls"] == b["rkls"] and b["reward"] == approx(np.mean(b["rewards"]), abs=1e-3)
        assert all(0 <= x <= 1 for x in b["rewards"])
    assert second["reward"] == second["evals"][-1]["reward"]
    says(0, r"\| tdpo2 α=0.5 \| 0\.", "extras/compare.py", "--runs=second.json", "--out=third")


STUB = """#!/bin/bash
# in python's place: it prints an SFT run's last line before its own, and fails once in TDPO1, on IMDb after a save
echo "$*" >> calls
for word; do case $word in --out_dir=*|--model=*) d=${word#*=};; esac; done
mkdir -p $d
[ $1 = sample.py ] && echo {} > $d/samples.jsonl && exit
echo "saved out/sft | next: python"
if [[ $d == *tdpo1 && ! -e $d/died ]]; then
    touch $d/died; [[ $d == out/imdb/* ]] && touch $d/state.pt; echo "error: it failed"; exit 1
fi
echo "saved $d | next: python"
"""


def test_the_loops_of_the_results_run_again_what_has_not_finished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "JUDGE", "TEXTS"):
        monkeypatch.setenv(name, name.lower())
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    os.mkdir("bin")
    write_lines("bin/python", [STUB])
    os.chmod("bin/python", 0o755)
    for path in glob.glob(f"{HERE}/*.py"):
        shutil.copy(path, ".")
    passes = []
    for _ in range(2):
        for study in ("reviews", "imdb", "hh"):
            done = subprocess.run(["bash", f"{HERE}/extras/study.sh", study], capture_output=True, text=True)
            assert done.returncode == 0 and not done.stderr, done.stderr
        passes.append([line.split() for line in open("calls") if "train.py" in line])
        os.remove("calls")
    runs = [(call[0], train.configure(call[1:])) for call in passes[0]]
    assert len(runs) == 8 * (11 + 3) + 3 * (1 + 6) + (1 + 4)

    # the plan of RESULTS.md
    planned = {(s, m, b, a) for s in range(1, 9) for m, b, a in [
        *(("dpo", b, 0.5) for b in (0.03, 0.1, 0.3, 1, 3)), ("tdpo1", 0.1, 0.5),
        *(("tdpo2", 0.1, a) for a in (0.25, 0.5, 1, 2, 5))]}
    found = [run for program, run in runs if run["data"] == "reviews" and program == "train.py"]
    assert {tuple(run[x] for x in ("seed", "method", "beta", "alpha")) for run in found} == planned
    found = [run for _, run in runs if run["data"] == "imdb" and run["method"] != "sft"]
    assert {tuple(run[x] for x in ("seed", "method", "beta", "alpha", "max_steps")) for run in found} == {
        (s, *x) for s in (1, 2, 3) for x in [("dpo", 0.1, 0.5, 30), ("dpo", 0.3, 0.5, 40), ("dpo", 1, 0.5, 40),
                                             ("tdpo1", 0.1, 0.5, 30), ("tdpo2", 0.1, 0.5, 40), ("tdpo2", 0.1, 1, 40)]}
    # a second start continues or repeats the runs that failed, and no others
    tdpo1 = [x for x in passes[0] if x[1].endswith("tdpo1")]
    again = [[*x[:2], "--resume=True"] if "imdb" in x[1] else x for x in tdpo1]
    assert len(again) == 8 + 3 + 1 and sorted(passes[1]) == sorted(again)
    # an edited objective is one line of README's
    lines = set(text_of("tdpo.py").splitlines())
    for name in ("lndpo", "tdpo2r", "ipo"):
        edited = set(text_of(os.path.abspath(f"out/edited/{name}/tdpo.py")).splitlines())
        assert len(lines - edited) == 1 and f"`{(edited - lines).pop().strip()}`" in text_of("README.md")


# ---------------------------------------------------------------------------------------------------------------------
# compare.py
