"""Tests of extras/judge.py, extras/show.py and the studies' scripts: python -m pytest -q extras"""
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

import numpy as np
import pytest
from pytest import approx

import eval_imdb
import train
from extras import judge, show
from test_tdpo import HERE, bytes_tokenizer, lines_of, made_once, runs, says, text_of, write_lines


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
    line = show.written(spans, show.on_terminal)
    assert re.sub(r"\033\[.*?m", "", line) == "ö<b>\\n€ [logratio 4.10 nats]"
    # a row of padding that was drawn has no text, but a value
    padded = types.SimpleNamespace(decode=lambda ids: "".join("ab"[x] for x in ids if x < 2))
    assert show.token_texts(padded, [0], [1, 7]) == ["b", "∅"]
    line = show.on_terminal(show.Span("a\rb\x1b[2J", (255, 255, 255)))
    assert "\r" not in line and line.count("\x1b") == 2


def test_show_shades_the_responses_that_sample_draws(models):
    """Both draw the same ones from a seed: their text is the response, and their sums are what sample.py measured."""
    options = ["--model=tuned", "--num_prompts=2", "--max_new_tokens=20"]
    says(0, "over 2 prompts", "sample.py", *options, "--out=rows.jsonl")
    rows = lines_of("rows.jsonl")
    show_it = ["extras/show.py", *options]
    # as users run it
    done = subprocess.run([sys.executable, "-m", "extras.show", *options, "--show=logratio", "--html=new/page.html"],
                          capture_output=True, text=True)
    out = done.stdout
    assert done.returncode == 0 and "its response's logratio (absolute values" in out, done.stderr
    assert "\033[30;48;2;255;255;255m" in out
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

    out = says(0, "", *show_it, "--show=surprisal")
    sums = [float(x) for x in re.findall(r"\[surprisal (\S+) nats\]", out)]
    row_sums = [row["surprisal"] * row["tokens"] for row in rows]
    assert [sums[n] for n in (0, 2, 1, 3)] == approx(row_sums, abs=0.006)
    out = says(0, "", *show_it)
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
        script += ["--model=ref", "--prompts=broken.jsonl"]
        for out in ("new/folder/x", "mine"):
            says(1, "line 1 is not JSON", *script, f"{option}={out}")
        says(2, "choose a different " + option, *script, f"{option}=/proc/x/y")
    assert not os.path.exists("new") and text_of(os.path.abspath("mine")) == "mine\n"


def test_answers_have_the_form_that_judges_read(models):
    questions = [dict(question_id=n, category="x", turns=["the plot", "the music"][:n]) for n in (1, 2)]
    write_lines("question.jsonl", [*questions, dict(question_id=3, turns=["the " * 200, "the music"])])
    write_lines("instructions.jsonl", [dict(instruction="the plot", dataset="reviews")])
    write_lines("list.json", [json.dumps([dict(instruction="the plot"), dict(instruction="the music")])])
    ask = ["extras/judge.py", "--model=chat", "--max_new_tokens=20"]
    bench = [*ask, "--format=mt_bench", "--prompts=question.jsonl", "--out=answers/tiny.jsonl"]
    out = says(0, "wrote 3 answers", *bench)
    assert "question 3 is too long in turn 1: its answer is empty" in out
    says(1, "line 1 is not a JSON object with question_id and turns", *bench, "--prompts=instructions.jsonl", "--out=x")
    says(2, "unknown option --show", *bench, "--show=kl")
    for found, turns in zip(lines_of("answers/tiny.jsonl"), (1, 2, 2), strict=True):
        replies = found["choices"][0]["turns"]
        assert found["model_id"] == "tiny" and len(replies) == turns
        assert (replies[0] == "") == (found["question_id"] == 3)
    for source, count in (("instructions.jsonl", 1), ("list.json", 2)):
        says(0, f"wrote {count} answers", *ask, "--format=alpaca_eval", f"--prompts={source}", "--out=tiny.json")
        found = json.load(open("tiny.json"))
        assert len(found) == count and (found[0]["generator"], found[0]["instruction"]) == ("tiny", "the plot")
        assert all(answer["output"] for answer in found)
    says(0, "wrote 1 answers", *ask, "--format=alpaca_eval", "--prompts=list.json", "--num_prompts=1",
         "--out=tiny.json")


def test_a_second_turn_follows_the_models_own_answer(models, monkeypatch):
    asked = []

    def generate(model, tokenizer, prompts, *_):
        asked.append([tokenizer.decode(prompt) for prompt in prompts])
        return [[tokenizer("was dull")["input_ids"]] for _ in prompts]
    monkeypatch.setattr(judge, "generate", generate)
    model, tokenizer = judge.load_model("chat")
    args = types.SimpleNamespace(max_new_tokens=5, temperature=1.0, top_p=1.0, seed=0)
    replies = judge.answer(model, tokenizer, [["the plot"], ["the music", "i saw"]], args)
    assert replies == [["was dull"], ["was dull", "was dull"]]
    assert [[" ".join(x.split()) for x in turn] for turn in asked] == [["the plot", "the music"],
                                                                       ["the music was dull i saw"]]


def test_samples_are_checked_by_hand_and_scored_by_a_second_classifier(runs):
    """The first script shares no code with the project, and the second learns moods from other reviews."""
    from datasets import Dataset
    out = says(0, "largest differences", "extras/check.py", "tdpo2")
    assert max(map(float, re.findall(r": '(\S+)'", out.splitlines()[-1]))) < 2e-4 and out.count("tdpo2 {") == 5
    says(0, "wrote", "extras/compare.py", "--runs=tdpo2", "--out=first")
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
    passes = []
    for path in glob.glob(f"{HERE}/*.py"):
        shutil.copy(path, ".")
    for _ in range(2):
        for command in ("study.sh reviews", "study.sh imdb", "hh.sh"):
            done = subprocess.run(f"bash {HERE}/extras/{command}", shell=True, capture_output=True, text=True)
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
    assert {(run["max_steps"], run["warmup_steps"], run["eval_interval"], run["eval_prefixes"]) for run in found} == {
        (120, 60, 10, 256)}
    found = [run for _, run in runs if run["data"] == "imdb" and run["method"] != "sft"]
    assert {tuple(run[x] for x in ("seed", "method", "beta", "alpha", "max_steps")) for run in found} == {
        (s, *x) for s in (1, 2, 3) for x in [("dpo", 0.1, 0.5, 30), ("dpo", 0.3, 0.5, 40), ("dpo", 1, 0.5, 40),
                                             ("tdpo1", 0.1, 0.5, 30), ("tdpo2", 0.1, 0.5, 40), ("tdpo2", 0.1, 1, 40)]}
    names = "batch_size", "eval_interval", "eval_prefixes", "max_new_tokens"
    assert {tuple(run[x] for x in names) for run in found} == {(16, 10, 600, 24)}
    # each name says what it is
    for program, run in runs:
        names = re.fullmatch(r"out/\w+/(\d-)?(\w+)(?:-alpha=(.+?))?(?:-beta=(.+))?", run["out_dir"]).groups("")
        seed, method, alpha, beta = names
        assert run["seed"] == int(seed[:1] or 1)
        if program == "train.py":
            assert (run["method"], run["alpha"]) == (method, float(alpha or 0.5))
            assert method != "dpo" or not beta or run["beta"] == float(beta)
        else:
            assert program == f"out/edited/{method}/train.py"
    tdpo1 = [x for x in passes[0] if x[1].endswith("tdpo1")]
    again = [[*x[:2], "--resume=True"] if "imdb" in x[1] else x for x in tdpo1]
    assert len(again) == 8 + 3 + 1 and sorted(passes[1]) == sorted(again)
    # an edited objective is one line of the README's
    lines = set(text_of("tdpo.py").splitlines())
    for name in ("lndpo", "tdpo2r", "ipo"):
        edited = set(text_of(os.path.abspath(f"out/edited/{name}/tdpo.py")).splitlines())
        assert len(lines - edited) == 1 and f"`{(edited - lines).pop().strip()}`" in text_of("README.md")
    shutil.rmtree("out")
