"""Tests of extras/: python -m pytest -q extras"""
import html
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import time
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
from test_tdpo import Run, bytes_tokenizer, lines_of, says, text_of, write_lines


@pytest.mark.parametrize("name", ["bench", "compare", "judge", "memory", "show"])
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

    # two processes share what stays, but for embeddings, output layer and last norm, which stay gathered; with adapters
    # each has everything
    half = memory.memory_needs(planned(adapters, "--processes=2"), LLAMA, examples)
    if rank:
        whole = memory.memory_needs(planned(adapters), LLAMA, examples)
        assert all(half[name] == whole[name] for name in ("weights", "gradients", "optimizer"))
        return
    outside = sum(p.nbytes for m in (model.model.embed_tokens, model.lm_head, model.model.norm) for p in m.parameters())
    assert half["gradients"] == trained / 2 and half["weights"] == (needs["weights"] + outside) / 2


def test_a_row_is_as_full_as_a_pass_or_a_step_and_its_logits_have_a_bound():
    for argv, count in (([], 16), (["--micro_tokens=100"], 1), (["--batch_size=4"], 4)):
        assert len(memory.fullest_row(planned(*argv))) == count
    model = memory.build(LLAMA)
    found = [memory.loss_bytes(model, n * memory.fullest_row(planned())) for n in (1, 10**3, 10**4)]
    assert found[0] < found[1] == found[2] == approx(3 * 2**29, rel=1e-3)


def test_a_run_is_reported_from_its_configuration(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]
    out = says(0, "16 examples of 8192 tokens", "extras/memory.py", f"--init_from={tmp_path}")
    sizes = [float(x) for x in re.findall(r"(\S+) GiB", out)]
    assert len(sizes) == 7 and sum(sizes[:-1]) == approx(sizes[-1], abs=0.04)
    says(2, "--processes must be at least 1", "extras/memory.py", f"--init_from={tmp_path}", "--processes=0")


def test_the_table_of_models_that_fit_is_computed(monkeypatch):
    readme = text_of("README.md")
    row = memory.table_row("0.5B (Qwen2.5)")
    assert f"\n{row}\n" in readme
    # the script writes between the markers and leaves the rest
    rows = {name: next(x for x in readme.splitlines() if x.startswith(f"| {name}")) for name in memory.MODELS}
    monkeypatch.setattr(memory, "table_row", rows.get)
    assert compare.with_tables(readme.replace(row, "| stale |"), {"fits": memory.table()}) == readme


# ---------------------------------------------------------------------------------------------------------------------
# bench.py


def test_the_forms_of_the_loss_layer_are_the_same_loss():
    case = bench.loss_case(256, 50, 8, 64, "cpu")
    losses, grads = {}, {}
    for form in ("fused", "naive"):
        losses[form] = bench.FORMS[form](*case)
        grads[form] = torch.autograd.grad(losses[form], case[:2])
    assert losses["fused"].item() == approx(losses["naive"].item(), rel=1e-5) and losses["fused"] != math.log(2)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads.values()))
    # whole pairs of two responses each, the long one too
    for response, pairs in ((64, 2), (128, 1)):
        *_, pair, chosen = bench.loss_case(256, 50, 8, response, "cpu")
        assert torch.bincount(2 * pair + chosen).tolist() == [response] * 2 * pairs


def test_cards_are_known_by_their_full_names():
    peaks = [bench.PEAK_FLOPS.get(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL",
                                                     "NVIDIA H100", "NVIDIA GeForce GTX 1080")]
    assert peaks == [989e12, 756e12, 835e12, None, None]


def test_the_day_on_a_gpu_takes_less_than_twelve_minutes():
    assert sum(limit for limit, *_ in bench.DAYS["gpu"].values()) <= 700


@pytest.mark.parametrize("adapters", [False, True])
def test_mfu_counts_the_products_of_a_step(adapters):
    """Llama's has separate input and output embeddings, GPT-2's are the same; the sizes are by hand."""
    for name, body, head in (("7B", 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096, 32000 * 4096),
                             ("toy", 2 * (12 * 32**2 + 13 * 32) + 2 * 32 + 1024 * 32, 2048 * 32)):
        model, _ = bench.random_model(name, "meta")
        flops = 8 * 1000 * body + (6 if adapters else 8) * 600 * head
        assert bench.mfu(model, 1000, 600, adapters, 1e12) == approx(flops / 1e12)


def test_the_day_on_a_gpu_works_at_toy_sizes_and_continues(tmp_path, monkeypatch):
    calls = []

    def in_fork(command, limit):
        """Faster than a new process that imports everything. The first one fails."""
        assert command[:3] == [sys.executable, "-m", "extras.bench"] and limit == 60
        calls.append(command[4])
        return Run("extras/bench.py", *command[3:]).end() if len(calls) > 1 else (1, "it | failed")
    monkeypatch.setattr(bench, "run_command", in_fork)
    found = bench.run_day(str(tmp_path), "toy")
    failed = {name: values.pop("failed") for name, values in found.items() if "failed" in values}
    assert failed.pop("tests") == "exit code 1: it | failed"
    if not importlib.util.find_spec("trl"):
        assert "No module named 'trl'" in failed.pop("TRL")
    assert not failed and all(found["loss"][form]["tflops"] > 0 for form in bench.FORMS)
    for name in ("HH", "adapters"):
        assert 0 < found[name]["full"] < 1.0001 and 0 < found[name]["loss_share"] < 1 and len(found[name]["costs"]) == 5
        assert found[name]["tokens_per_s"] > found[name]["pairs_per_s"] > 0 and "mfu" not in found[name]
    # one pair of 20 + 2 x 580 tokens, of which the last two are only labels, fills its row
    assert found["adapters"]["full"] == approx(1)
    # started again, only what failed runs
    calls[:] = ["again"]
    again = bench.run_day(str(tmp_path), "toy")
    assert again["tests"]["passed"] == 1 and set(calls[1:]) <= {"bench_tests", "bench_trl"}
    table = [line for line in open(tmp_path / "toy-cpu.md") if line[0] == "|"]
    assert len(table) == 2 + 4 + 5 and json.load(open(tmp_path / "toy-cpu.json")) == again


def test_a_measurement_that_takes_too_long_ends_with_what_it_started(tmp_path):
    with pytest.raises(RuntimeError, match="did not end within 1 seconds"):
        bench.run_command(["bash", "-c", f"(sleep 3; touch {tmp_path}/late) & wait"], 1)
    assert bench.run_command(["bash", "-c", "echo words; exit 3"], 9) == (3, "words\n")
    time.sleep(2.5)
    assert not os.listdir(tmp_path)


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
    write_lines("tuned/options.json", [dict(method="tdpo2", init_from=os.path.abspath("ref"), ref_from="")])
    write_lines("tuned/prompts.jsonl", [dict(prompt=text) for text in ("the plot", "i saw this", "a dull")])
    shutil.copytree("ref", "chat")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained("chat")


def test_each_token_has_its_text_and_its_share():
    """If a letter is several tokens, the last one shows it. No text is lost, and none is read as HTML."""
    letters = bytes_tokenizer()
    prompt, response = letters("né")["input_ids"], letters("ö<b>\n€")["input_ids"]
    texts = show.token_texts(letters, prompt, response)
    assert texts == ["", "ö", "<", "b", ">", "\n", "", "", "€"]
    values = np.array([3.0, 1, 0, 2, 1, 0.1, -2, -1, 0])
    spans = show.shaded(texts, values, "logratio")
    page = show.written(spans, show.on_page)
    assert re.sub(r"<.*?>", "", page) == "ö&lt;b&gt;\n€ [logratio 4.10 nats]"
    colors = [[int(x) for x in color] for color in re.findall(r"rgb\((\d+),(\d+),(\d+)\)", page)]
    assert colors[1] == [255, 255, 255] == colors[4] and colors[5][2] > colors[5][0] and colors[0][0] > colors[0][2]
    # 4 of 10.1 are one shade darker than 2 are, which are darker than 1
    assert colors[0][2] < colors[2][2] < colors[3][2] < 255


def test_show_shades_the_responses_that_sample_draws(models):
    """Both scripts draw the same responses from a seed, and the sums are those that sample.py measured."""
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
    out = says(0, "", "extras/show.py", *options)
    sums = [float(x) for x in re.findall(r"\[kl (\S+) nats\]", out)]
    assert sums == approx([row["kl"] for row in rows[2:]], abs=0.006)
    # a model that is no run has no reference, and needs none for its own surprisal
    ask = ["extras/show.py", "--model=ref", "--prompt=the plot", "--max_new_tokens=5"]
    says(2, "--show=kl compares with a reference", *ask)
    says(0, "surprisal", *ask, "--show=surprisal")


def test_nothing_that_a_model_writes_moves_the_cursor():
    for color, around in ((None, ("", "")), ((1, 2, 3), ("\033[30;48;2;1;2;3m", "\033[0m"))):
        text = show.on_terminal(show.Span("a\033[2J\rb", color))
        assert text == "a\\x1b[2J\\rb".join(around)


def test_answers_have_the_form_that_judges_read(models):
    turns = ["the plot"], ["the plot", "the music"]
    write_lines("question.jsonl", [dict(question_id=n, turns=texts) for n, texts in enumerate(turns, 1)])
    write_lines("instructions.jsonl", [dict(instruction="the plot"), dict(instruction="the music")])
    ask = ["extras/judge.py", "--model=chat", "--max_new_tokens=20"]
    bench = [*ask, "--format=mt_bench", "--out=answers/tiny.jsonl"]
    says(0, "wrote 2 answers", *bench, "--prompts=question.jsonl")
    says(2, "line 1 is not a JSON object with question_id and turns", *bench, "--prompts=instructions.jsonl")
    write_lines("wrong.jsonl", [dict(question_id=1, turns="the plot")])
    says(2, "where turns is a list of texts", *ask, "--format=mt_bench", "--out=wrong.json", "--prompts=wrong.jsonl")
    assert not os.path.exists("wrong.json")
    write_lines("long.jsonl", [dict(question_id=1, turns=["the plot", "the " * 200])])
    says(0, "question 1 is too long in turn 2: its answer is empty", *ask, "--format=mt_bench", "--out=long.json",
         "--prompts=long.jsonl")
    for found, texts in zip(lines_of("answers/tiny.jsonl"), turns, strict=True):
        replies = found["choices"][0]["turns"]
        assert found["model_id"] == "tiny" and len(replies) == len(texts) and all(replies)
    says(0, "wrote 2 answers", *ask, "--format=alpaca_eval", "--prompts=instructions.jsonl", "--out=tiny.json")
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
# compare.py

REWARDS = {0: 0.0, 4: 0.2, 8: 0.5}          # the mean at each evaluation of the run that `write_run` makes


def write_run(folder, seed=1, rewards=REWARDS, edit="", **options):
    """A directory as train.py writes it: 20 steps, three evaluations with the samples of 24 prefixes."""
    os.makedirs(f"{folder}/evals")
    options = {"seed": seed, "data": "reviews", "method": "tdpo2", "alpha": 0.5, "beta": 0.1, "out_dir": str(folder),
               "init_from": f"reviews-sft-{seed}", "ref_from": "", "reward": "exact", "texts": "", **options}
    with open(f"{folder}/options.json", "w") as f:
        json.dump(options, f)
    with open(f"{folder}/tdpo.py", "w", encoding="utf-8") as f:
        f.write(text_of("tdpo.py") + edit)
    noise = np.random.default_rng(seed).normal(size=24)
    records = [{"step": n, "kl_w": 0.1 * n, "kl_l": 0.2 * n, "loss": 0.6} for n in range(1, 21)]
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
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def seeds_of(out):
    """{label: how many seeds it has} of the first table."""
    return {label: int(seeds) for label, seeds in re.findall(r"^\| ([^|]+?) \|.* (\d+) × 24 \|$", out, re.M)}


def compared(*args):
    return says(0, "wrote", "extras/compare.py", *args)


def test_rewards_at_a_kl_are_compared_seed_by_seed_and_prefix_by_prefix():
    """Compared with draws that are made one by one. The prefixes differ far more than the methods do."""
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
    lines = compare.differences(runs["tdpo2"] + runs["dpo"], [1.5], {"tdpo2": "dpo"})
    assert lines[2:] == ["| tdpo2 | dpo | – (4 of 6 began alike) |"]


def test_a_level_counts_if_most_draws_reach_it_and_where_they_do_so_first():
    evals = [dict(rewards=[0.0] * 40, rkls=[0.0] * 40), dict(rewards=[1.0] * 40, rkls=[0.0, 2.0] * 20)]
    hair, reached = compare.compared([dict(pair="x", n=40, evals=evals)], None, [0.999, 0.2])
    assert hair == "–" and reached.startswith("+0.200 [")
    kls, rewards = np.array([[0.0, 2, 1, 3], [0, 0.5, 0.6, 0.7]]), np.array([[0.0, 1, 5, 7], [0, 1, 2, 3]])
    assert compare.reward_at(kls, rewards, 1.5) == approx([0.75, math.nan], nan_ok=True)
    assert compare.reward_at(kls, rewards, 2.5)[0] == approx(6.5)


def test_what_is_written_makes_the_same_tables(folder):
    write_run("a")
    levels = ["--at_kl", "2", "100"]
    out = compared("--runs=a", *levels, "--out=first")
    (result,) = json.load(open("first.json"))
    # the line from KL 0 to KL 4 * 1.115 crosses 2, and no run reaches 100
    first, second, last = [e["reward"] for e in result["evals"]]
    at_2 = first + (second - first) * 2 / (4 * 1.115)
    assert re.search(rf"^\| tdpo2 α=0.5 \| {last:.3f} ± .* \| \+{at_2:.3f} \[.*\] \| – \| 1 × 24 \|$", out, re.M)
    assert seeds_of(out) == {"reference": 1, "tdpo2 α=0.5": 1}
    assert result["curves"] == [{"step": 10, "kl_w": 0.55, "kl_l": 1.1}, {"step": 20, "kl_w": 1.55, "kl_l": 3.1}]
    again = compared("--runs=first.json", *levels, "--out=again")
    assert re.findall(r"^\|.*", out, re.M) == re.findall(r"^\|.*", again, re.M)
    says(2, "nowhere holds no run", "extras/compare.py", "--runs=a,nowhere")
    says(2, "the runs are called tdpo2 α=0.5", "extras/compare.py", "--runs=a", "--against=dpo")


def test_runs_that_differ_only_in_their_seed_share_a_line(folder):
    write_run("tdpo2")
    write_run("others/1-x", rewards={0: 0.0, 4: 0.3, 8: 0.4})
    # the same run once more is no second seed
    assert seeds_of(compared("--runs=tdpo2,others/1-x,tdpo2")) == {"reference": 1, "tdpo2 α=0.5": 1, "x": 1}
    # an edited objective has the name of the directory, which its seeds share if they differ in nothing else
    for name, seed, rate in (("1-more", 1, 1e-4), ("2-more", 2, 1e-4), ("3-more", 3, 2e-4), ("4-more", 1, 1e-4)):
        # runs know their models by absolute paths
        start = os.path.join(os.getcwd() if seed == 2 else "", f"reviews-sft-{seed}")
        write_run(name, seed, edit="\nedited = True", learning_rate=rate, init_from=start)
    out = compared("--runs=tdpo2,?-more", "--at_kl", "2", "--against", "tdpo2 α=0.5")
    assert seeds_of(out) == {"reference": 3, "tdpo2 α=0.5": 1, "more": 2, "3-more": 1, "4-more": 1}
    assert "| more | tdpo2 α=0.5 | – (1 of 2 began alike) |" in out
    assert "| 4-more | tdpo2 α=0.5 | +0.000 [+0.000, +0.000] |" in out
    out = compared("--runs=?-more,tdpo2", "--only", "tdpo2 α=0.5", "3-more", "--out=some")
    assert list(seeds_of(out)) == ["reference", "3-more", "tdpo2 α=0.5"]
    # a different seed joins what was written before; a run with other options does not
    write_run("5-a", 5)
    write_run("6-b", 6, learning_rate=1.0)
    out = compared("--runs=5-a,6-b,some.json", "--out=again")
    assert seeds_of(out) == {"reference": 4, "3-more": 1, "tdpo2 α=0.5": 2, "b": 1}


def test_the_tables_of_the_results_are_those_of_the_data():
    texts = [text_of("README.md"), text_of("assets/RESULTS.md")]
    assert all("".join(texts).count(f"<!-- table {name} -->\n|") == 1 for name in compare.TABLES)
    # a number that somebody has changed in each table is changed back
    edited = [re.sub(r"(<!-- table (?:reviews|imdb).*?-->.*?\d)\.\d", r"\1.x", text, flags=re.S) for text in texts]
    assert sum(text.count(".x") for text in edited) == len(compare.TABLES)
    tables = compare.result_tables()
    assert [compare.with_tables(text, tables) for text in edited] == texts
