"""Tests of extras/compare.py."""
import gzip
import json
import math
import os
import re
import runpy
import sys

import numpy as np
import pytest
from pytest import approx

from extras import compare

REWARDS = {0: 0.0, 4: 0.2, 8: 0.5}          # the mean at each evaluation of the run that `write_run` makes


def write_run(folder, seed=1, rewards=REWARDS, edit=("", ""), **options):
    """A directory as train.py writes it: 20 steps, three evaluations with the samples of 24 prefixes."""
    os.makedirs(f"{folder}/evals")
    options = {"seed": seed, "data": "reviews", "method": "tdpo2", "alpha": 0.5, "beta": 0.1, "out_dir": str(folder),
               "init_from": f"reviews-sft-{seed}", "ref_from": "", "reward": "exact", "texts": "", **options}
    with open(f"{folder}/options.json", "w") as f:
        json.dump(options, f)
    with open(f"{compare.PROJECT}/tdpo.py", encoding="utf-8") as f:
        objective = f.read()
    assert edit[0] in objective
    with open(f"{folder}/tdpo.py", "w", encoding="utf-8") as f:
        f.write(objective.replace(*edit))
    noise = np.random.default_rng(seed).normal(size=24)
    records = [{"step": n, "kl_w": 0.1 * n, "kl_l": 0.2 * n, "kl_gap": 0.1 * n, "loss": 0.6} for n in range(1, 21)]
    for step, mean in rewards.items():
        samples = []
        for n in range(24):
            samples.append({"prompt": f"prefix {seed} {n}", "tokens": [n], "reward": mean + noise[n] / 10,
                            "rkl": step * (1 + n / 100)})
        with open(f"{folder}/evals/{step}.jsonl", "w") as f:
            f.writelines(json.dumps(sample) + "\n" for sample in samples)
        record = {"step": step, "eval_n": 24}
        for name, values in (("reward", [x["reward"] for x in samples]), ("sample_rkl", [x["rkl"] for x in samples]),
                             ("sample_kl", [step / 2] * 24), ("entropy", [0.9] * 24)):
            record["eval_" + name] = np.mean(values)
            record[f"eval_{name}_se"] = np.std(values, ddof=1) / 24**0.5
        records.append(record)
    with open(f"{folder}/log.jsonl", "w") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the script with these arguments, in a folder of its own, and returns what it says."""
    monkeypatch.chdir(tmp_path)

    def run(*args, code=0):
        monkeypatch.setattr(sys, "argv", ["compare.py", *args])
        found = 0
        try:
            runpy.run_path(compare.__file__, run_name="__main__")
        except SystemExit as end:
            found = end.code
        out = "".join(capsys.readouterr())
        assert found == code, out
        return out
    return run


def lines_of(out):
    """{label: how many seeds it has} of the first table."""
    return {label: int(seeds) for label, seeds in re.findall(r"^\| ([^|]+?) \|.* (\d+) × 24 \|$", out, re.M)}


def test_rewards_at_a_kl_are_compared_seed_by_seed_and_prefix_by_prefix():
    """Against draws that are made one by one, when the prefixes differ far more than the methods do."""
    rng, runs = np.random.default_rng(1), {}
    for label, gain in (("dpo", 0.0), ("tdpo2", 0.1)):
        runs[label] = []
        for seed in range(6):
            evals, own = [], np.random.default_rng(seed).normal(size=40)
            for step in range(4):
                rewards = own + (0.2 + gain) * step + rng.normal(size=40) * 0.02
                evals.append(dict(step=step, rewards=list(rewards), rkls=[float(step)] * 40))
            runs[label].append(dict(label=label, pair=f"prefixes {seed}", n=40, evals=evals))
    others = {run["pair"]: run for run in runs["dpo"]}
    (((mean, low, high, t), seeds),) = compare.compare(runs["tdpo2"], others, [1.5])
    means = [[np.mean([e["rewards"] for e in run["evals"][1:3]]) for run in group] for group in runs.values()]
    gains = np.subtract(means[1], means[0])
    assert mean == approx(np.mean(gains)) and seeds == 6
    # by hand: seeds, then prefixes
    drawn = []
    for _ in range(2000):
        found = []
        for seed in rng.integers(6, size=6):
            prefixes = rng.integers(40, size=40)
            at = [np.mean([np.array(e["rewards"])[prefixes] for e in runs[x][seed]["evals"][1:3]]) for x in runs]
            found.append(at[1] - at[0])
        drawn.append(np.mean(found))
    assert [low, high] == approx(np.percentile(drawn, (2.5, 97.5)), abs=5e-4) and 0 < low < 0.15 < high < 0.16
    assert t == approx(2.571 * np.std(gains, ddof=1) / 6**0.5)
    # by themselves, seeds and prefixes count
    (((_, low, high, _), _),) = compare.compare(runs["dpo"], None, [1.5])
    assert high - low > 0.15
    # a KL that one run does not reach, one that none does, and other prefixes
    runs["tdpo2"][0]["evals"].pop()
    assert compare.compared(runs["tdpo2"], others, [2.5, 9]) == ["– (5 of 6)", "–"]
    runs["tdpo2"][1]["pair"], runs["tdpo2"][2]["pair"] = "prefixes of a different run", None
    lines = compare.differences(runs["tdpo2"] + runs["dpo"], [1.5], "dpo")
    assert lines[2:] == ["| tdpo2 | – (4 of 6 began alike) |"]


def test_a_level_counts_if_most_draws_reach_it_and_where_they_do_so_first():
    evals = [dict(rewards=[0.0] * 40, rkls=[0.0] * 40), dict(rewards=[1.0] * 40, rkls=[0.0, 2.0] * 20)]
    hair, reached = compare.compared([dict(pair="x", n=40, evals=evals)], None, [0.999, 0.2])
    assert hair == "–" and reached.startswith("+0.200 [")
    kls, rewards = np.array([[0.0, 2, 1, 3], [0, 0.5, 0.6, 0.7]]), np.array([[0.0, 1, 5, 7], [0, 1, 2, 3]])
    assert compare.reward_at(kls, rewards, 1.5) == approx([0.75, math.nan], nan_ok=True)
    assert compare.reward_at(kls, rewards, 2.5)[0] == approx(6.5)


def test_what_is_written_makes_the_same_tables(run):
    write_run("a")
    levels = ["--at_kl", "2", "100"]
    out = run("--runs=a", *levels, "--out=first")
    (result,) = json.load(open("first.json"))
    # the line from KL 0 to KL 4 * 1.115 crosses 2, and no run reaches 100
    first, second, last = [e["reward"] for e in result["evals"]]
    at_2 = first + (second - first) * 2 / (4 * 1.115)
    assert re.search(rf"^\| tdpo2 α=0.5 \| {last:.3f} ± .* \| \+{at_2:.3f} \[.*\] \| – \| 1 × 24 \|$", out, re.M)
    assert lines_of(out) == {"reference": 1, "tdpo2 α=0.5": 1}
    assert [e["step"] for e in result["evals"]] == [0, 4, 8] and len(result["evals"][1]["rewards"]) == 24
    assert result["curves"] == [{"step": 10, "kl_w": 0.55, "kl_l": 1.1, "kl_gap": 0.55},
                                {"step": 20, "kl_w": 1.55, "kl_l": 3.1, "kl_gap": 1.55}]
    assert os.path.exists("first.png") or "no figure was drawn" in out
    with gzip.open("second.json.gz", "wb") as f:
        f.write(open("first.json", "rb").read())
    again = run("--runs=second.json.gz", *levels, "--out=again")
    assert re.findall(r"^\|.*", out, re.M) == re.findall(r"^\|.*", again, re.M)
    # bad input says what is wrong
    write_run("sft", method="sft")
    open("broken.json.gz", "wb").write(open("second.json.gz", "rb").read()[:-20])
    open("odd.json", "w").write("[1]")
    for sources, message in (("sft", "sft has no reward: it trained sft on reviews"),
                             ("nowhere", "nowhere holds no run"), ("broken.json.gz", "broken.json.gz holds no run"),
                             ("odd.json", "odd.json holds no run")):
        assert message in run(f"--runs=a,{sources}", "--out=bad", code=2)
    assert "the runs are called tdpo2 α=0.5" in run("--runs=a", "--against=dpo", "--out=bad", code=2)
    assert "--runs names directories" in run(code=2)


def test_runs_that_differ_only_in_their_seed_share_a_line(run):
    write_run("tdpo2")
    write_run("others/1-x", rewards={0: 0.0, 4: 0.3, 8: 0.4})
    # the same run once more is no second seed
    assert lines_of(run("--runs=tdpo2,others/1-x,tdpo2")) == {"reference": 1, "tdpo2 α=0.5": 1, "x": 1}
    # an edited objective has the name of the directory, which its seeds share if they differ in nothing else
    edit = "return -F.logsigmoid(m)", "return torch.relu(1 - m)"
    for name, seed, rate in (("1-more", 1, 1e-4), ("2-more", 2, 1e-4), ("3-more", 3, 2e-4), ("4-more", 1, 1e-4)):
        write_run(name, seed, edit=edit, learning_rate=rate)
    out = run("--runs=tdpo2,?-more", "--at_kl", "2", "--against", "tdpo2 α=0.5")
    assert lines_of(out) == {"reference": 3, "tdpo2 α=0.5": 1, "more": 2, "3-more": 1, "4-more": 1}
    assert re.search(r"less tdpo2 α=0.5 at KL 2 \|\n.*\n\| more \| – \(1 of 2 began alike\) \|\n", out)
    assert "| 4-more | +0.000 [+0.000, +0.000] |" in out
    # also by itself; and a different comment makes no different objective
    assert lines_of(run("--runs=1-more")) == {"reference": 1, "more": 1}
    write_run("commented", edit=("\nimport torch", "\n# a comment\nimport torch"))
    assert lines_of(run("--runs=commented")) == {"reference": 1, "tdpo2 α=0.5": 1}
    out = run("--runs=?-more,tdpo2", "--only", "tdpo2 α=0.5", "3-more", "--out=some")
    assert list(lines_of(out)) == ["reference", "3-more", "tdpo2 α=0.5"] and len(json.load(open("some.json"))) == 2
    # without the samples of an evaluation there is no comparison
    os.remove("4-more/evals/4.jsonl")
    assert re.search("not compared at equal KL, .*: 4-more$", run("--runs=4-more"), re.M)


def test_runs_join_what_was_written_before(run):
    """A different seed joins its line; the same seed and runs with other options do not."""
    write_run("tdpo2")
    run("--runs=tdpo2", "--out=first")
    for name, seed, options, expected in (
        ("others/tdpo2", 1, {}, {"reference": 1, "tdpo2 α=0.5": 1, "tdpo2": 1}),
        ("others/5-a", 5, {}, {"reference": 2, "tdpo2 α=0.5": 2}),
        ("others/6-b", 6, dict(learning_rate=1.0), {"reference": 2, "tdpo2 α=0.5": 1, "b": 1}),
    ):
        write_run(name, seed, **options)
        assert lines_of(run(f"--runs={name},first.json", "--out=again")) == expected
    # nor does a run that is given twice, or that was written elsewhere
    os.link("first.json", "same.json")
    run("--runs=others/tdpo2", "--out=moved")
    found = lines_of(run("--runs=first.json,same.json,moved.json", "--out=again"))
    assert found == {"reference": 1, "tdpo2 α=0.5": 1, "tdpo2 α=0.5 of moved.json": 1}


def test_the_tables_of_the_results_are_those_of_the_data():
    texts = {}
    for name in ("README.md", "assets/RESULTS.md"):
        with open(f"{compare.PROJECT}/{name}", encoding="utf-8") as f:
            texts[name] = f.read()
    everything = "".join(texts.values())
    assert all(everything.count(f"<!-- table {name} -->\n|") == 1 for name in compare.TABLES)
    for text in texts.values():
        # a number that somebody has changed, in the first table
        begin = text.index("<!-- table reviews")
        edited = text[:begin] + re.sub(r"\d\.\d", "9.9", text[begin:], count=1)
        assert edited != text and compare.with_tables(edited)[0] == text
