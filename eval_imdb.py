"""The sentiment task, real (IMDb) and embedded (a seeded grammar of film reviews): texts, reward, pairs, scores.

    python eval_imdb.py --runs=out/reviews-dpo,out/reviews-tdpo2            # a table and a figure from the runs' logs
    python eval_imdb.py --runs='out/reviews/[1-8]-*/' --against dpo         # means, differences of eight seeds
    python eval_imdb.py --runs=out/reviews-dpo --score=out/reviews-dpo,DIR  # checkpoints scored anew, from anywhere

Both take the same path; only texts, SFT model and reward differ (paper, Section 5.1; Rafailov et al. 2023, App. C.1).
"""
import argparse
import ast
import functools
import glob
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sample import (DEVICES, encode_prompt, generate, load_model, load_reference, measure, parse, ratio_mean,
                    read_rows, response_stats, response_text, writable)

TASKS = ("reviews", "imdb")

# -----------------------------------------------------------------------------
# the embedded task: a review has a mood, how often its sentiment words are positive; all its words are the grammar's

POSITIVE = ("wonderful superb charming brilliant touching gripping clever delightful warm fresh funny moving elegant "
            "honest thrilling loved enjoyed admired praised recommend treasure").split()
NEGATIVE = ("dull awful tedious clumsy boring weak lifeless messy bland stale shallow painful hollow lazy annoying "
            "hated endured regretted mocked avoid forget").split()
GRAMMAR = {
    "review": ["{opening} . {line} . {story} . {line} . {line} . {verdict} ."],
    "opening": ["i saw this {film} with {friend} {when}", "this {film} came out {when}",
                "we watched this {film} at {place} {when}", "{friend} told me about this {film} {when}",
                "the {film} opens in {place}"],
    "story": ["the story follows a {job} who {does} in {place}", "it is about a {job} and a {job} who meet in {place}",
              "most of it takes place in {place} where a {job} {does}"],
    "line": ["{part} was {very} {adj}", "{part} felt {adj} and {part} seemed {very} {adj}", "i {verb} {part}",
             "{friend} {verb} {part} too", "there is a scene in {place} that i found {very} {adj}",
             "with {part} so {adj} it is hard to look away from {part}", "{part} is {adj} but {part} is {very} {adj}",
             "even {part} looked {adj} next to {part}"],
    "verdict": ["in the end i would {advice} this {film} to anyone", "all in all a {very} {adj} {film}",
                "a {adj} and {adj} {film} that i {verb}"],
    "film": ["film", "movie", "picture", "drama", "comedy", "thriller"],
    "friend": ["my sister", "a friend", "my father", "our neighbour"],
    "when": ["last week", "last night", "years ago", "in the spring", "on a rainy day"],
    "very": ["very", "quite", "rather", "truly", "simply"],
    "place": ["the city", "a small town", "the old theatre", "the harbour", "the mountains", "a quiet village"],
    "job": ["teacher", "sailor", "doctor", "painter", "detective", "farmer"],
    "does": ["looks for a lost letter", "learns to sing", "hides from the law", "returns after the war",
             "opens a bakery"],
    "part": ["the acting", "the plot", "the music", "the dialogue", "the ending", "the camera work", "the first half",
             "the humour", "the villain", "the pacing", "the lead actor", "the script"],
    "adj+": POSITIVE[:15], "verb+": POSITIVE[15:19], "advice+": POSITIVE[19:],
    "adj-": NEGATIVE[:15], "verb-": NEGATIVE[15:19], "advice-": NEGATIVE[19:],
}


def write_review(rng):
    """One review of about 60 words."""
    # drawn once, so that its words agree more often than not
    mood = rng.choice((0.15, 0.5, 0.85))

    def expand(symbol):
        if symbol not in GRAMMAR:
            symbol += "+" if rng.random() < mood else "-"
        return re.sub(r"\{(\w+)\}", lambda match: expand(match[1]), rng.choice(GRAMMAR[symbol]))
    return expand("review")


def exact_reward(texts):
    """(positive - negative) / (positive + negative) words of each text, in [-1, 1]; 0 where there are none."""
    rewards = []
    for text in texts:
        positive = sum(word in POSITIVE for word in text.split())
        negative = sum(word in NEGATIVE for word in text.split())
        rewards.append((positive - negative) / max(1, positive + negative))
    return rewards


def scratch_model(seed):
    """The embedded task's untrained policy: a GPT-2 of 0.1M parameters and its word-level tokenizer."""
    # all words of the grammar
    lines = " ".join(itertools.chain(*GRAMMAR.values()))
    words = sorted(set(re.sub(r"\{\w+\}", " ", lines).split()))
    ids = {word: i for i, word in enumerate(["<eos>", "<unk>", *words])}
    splitter = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, eos_token="<eos>", unk_token="<unk>",
                                        pad_token="<eos>", clean_up_tokenization_spaces=False)

    # erf's GELU, as GPT-2's own approximation takes a quarter of a step on a CPU
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
                        eos_token_id=0, activation_function="gelu")
    return GPT2LMHeadModel(config).eval(), tokenizer


# -----------------------------------------------------------------------------
# both tasks: texts, prefixes, reward, pairs


def load_texts(data, source):
    """{"train": [...], "test": [...]}: review texts, of IMDb without line breaks, in an order of our own.

    source (imdb): a hub id with these splits, or a .parquet or .jsonl file with columns text and split; without split
    every tenth text is for testing. Ends the program with one sentence where there are none.
    """
    if data == "reviews":
        rng = random.Random(0)
        reviews = [write_review(rng) for _ in range(11000)]
        return {"train": reviews[:10000], "test": reviews[10000:]}

    # one table with a column split, or a data set with these splits
    if os.path.isfile(source):
        rows = [row for _, row in read_rows(source)]
    else:
        rows = []
        for split in ("train", "test"):
            rows += [{**row, "split": split} for _, row in read_rows(source, split)]

    # one line each; IMDb is sorted by label
    texts = {"train": [], "test": []}
    for n, row in enumerate(rows):
        text, split = None, "test" if n % 10 == 9 else "train"
        if isinstance(row, dict):
            text, split = row.get("text"), row.get("split", split)
        if split in texts and isinstance(text, str) and text.strip():
            text = re.sub(r"<br\s*/?>", " ", text)
            texts[split].append(re.sub(r"\s+", " ", text).strip())
    print(f"texts: {len(texts['train'])} to train on, {len(texts['test'])} to test on, of {len(rows)} rows in {source}")
    for split in texts:
        if not texts[split]:
            sys.exit(f"error: {source} has no text in its {split} split; the column split names train or test")
        random.Random(0).shuffle(texts[split])
    return texts


def task_prefixes(texts, tokenizer, seed, train_prefixes, eval_prefixes):
    """{"train": [...], "test": [...]}: so many beginnings of 2 to 8 tokens, each of its own review, as text."""
    # by split and seed, whatever is drawn for the other
    prefixes = {}
    for split, count in (("train", train_prefixes), ("test", eval_prefixes)):
        rng = random.Random(f"{seed} {split}")
        prefixes[split] = []
        count = min(count, len(texts[split]))
        for text in rng.sample(texts[split], count):
            beginning = " ".join(text.split()[:16])
            ids = tokenizer(beginning, add_special_tokens=False)["input_ids"]
            length = rng.randint(2, 8)
            # never ends inside a character
            while length < len(ids) and tokenizer.decode(ids[:length]).endswith("\ufffd"):
                length += 1
            prefixes[split].append(tokenizer.decode(ids[:length]))
    return prefixes


def load_reward(name, device="cpu"):
    """A function texts -> list of rewards: "exact" (the embedded task's), or P(positive) of a text-classification model
    with a label called positive. Ends the program with one sentence where there is none that can score texts."""
    if name == "exact":
        return exact_reward
    model, tokenizer = load_model(name, device, AutoModelForSequenceClassification)
    labels = {i: str(label) for i, label in model.config.id2label.items()}
    positive = [i for i, label in labels.items() if label.lower().startswith("pos")]
    if len(positive) != 1:
        labels = sorted(labels.values())
        sys.exit(f"error: the reward model {name} has labels {labels}; one must be called positive")
    # a decoder finds a text's last token by its padding
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    longest = min(512, getattr(model.config, "max_position_embeddings", None) or 512)

    @torch.no_grad()
    def reward(texts):
        scores = np.zeros(len(texts))
        # texts of like lengths together
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for begin in tqdm(range(0, len(order), 64), desc="scoring", leave=False, disable=None):
            batch = order[begin:begin + 64]
            inputs = tokenizer([texts[i] for i in batch], padding=True, truncation=True, max_length=longest,
                               return_tensors="pt").to(device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                logits = model(**inputs).logits.float()
            scores[batch] = logits.softmax(-1)[:, positive[0]].cpu()
        return scores.tolist()

    # what is wrong with it is said before hours of sampling
    try:
        reward(["good", "good " * 600])
    except Exception as error:
        sys.exit(f"error: the reward model {name} cannot score texts: {type(error).__name__}: {error}")
    return reward


def complete(model, tokenizer, prefixes, max_new_tokens, num_samples, seed):
    """Completions (temperature 1, no nucleus), a flat list of (index of the prefix, prompt ids, response ids, text)."""
    prompts = [encode_prompt(tokenizer, prefix) for prefix in prefixes]
    drawn = generate(model, tokenizer, prompts, max_new_tokens, num_samples, seed=seed)
    completions = []
    for i, responses in enumerate(drawn):
        for response in responses:
            text = response_text(tokenizer, prompts[i], response)
            completions.append((i, prompts[i], response, text))
    return completions


def build_pairs(run, model, tokenizer, prefixes, reward):
    """The path of a run's preference pairs, a .jsonl beside its out_dir: prompt, chosen, rejected and their scores.

    `completions` samples of the SFT model for each prefix; every two of them make a pair, the higher reward is chosen;
    pairs closer than min_score_gap are dropped. The name holds a hash of all that makes the file, so it is reused.
    """
    # the same model, reward and options make the same file
    made_of = [run[name] for name in ("reward", "completions", "min_score_gap", "max_new_tokens", "seed")]
    for path in sorted(glob.glob(glob.escape(run["reward"]) + "/*")):
        made_of.append((path, os.path.getsize(path), os.path.getmtime(path)))
    digest = hashlib.sha256(json.dumps([prefixes, made_of]).encode())
    for p in model.parameters():
        digest.update(p.detach().cpu().contiguous().numpy())
    folder = os.path.dirname(run["out_dir"]) or "."
    path = os.path.join(folder, f"{run['data']}-pairs-{digest.hexdigest()[:12]}.jsonl")
    if os.path.exists(path):
        print(f"pairs: reusing {path}")
        return path

    # each prefix with its completions and their rewards
    print(f"pairs: sampling {run['completions']} completions for each of {len(prefixes)} prefixes", flush=True)
    samples = complete(model, tokenizer, prefixes, run["max_new_tokens"], run["completions"], run["seed"])
    scores = reward([prefixes[i] + text for i, _, _, text in samples])
    scored = [[] for _ in prefixes]
    for (i, _, _, text), score in zip(samples, scores):
        if text.strip():
            scored[i].append((score, text))

    # every two of them
    rows, tried = [], 0
    for prefix, candidates in zip(prefixes, scored):
        for a, b in itertools.combinations(candidates, 2):
            tried += 1
            (low, rejected), (high, chosen) = sorted((a, b))
            if high - low > run["min_score_gap"]:
                rows.append(dict(prompt=prefix, chosen=chosen, rejected=rejected, chosen_score=high,
                                 rejected_score=low))
    print(f"pairs: {len(rows)} of {tried} kept, score gap over {run['min_score_gap']}; "
          f"mean reward of the samples {np.mean(scores):+.3f}")
    if not rows:
        sys.exit("error: every pair was dropped: no two rewards differ by more than --min_score_gap; lower it")

    # by a name of its own, as two runs may be at it
    with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(f"{path}.{os.getpid()}", path)
    return path


# -----------------------------------------------------------------------------
# scores of a policy


def score_policy(model, ref, tokenizer, prefixes, reward, max_new_tokens, seed=0):
    """One sample for each test prefix: ({reward, sample_kl, sample_rkl, entropy, their standard errors (name_se), n},
    the samples, a dict each)."""
    # one completion a prefix, so the samples are independent
    samples = complete(model, tokenizer, prefixes, max_new_tokens, 1, seed)
    prompts = [prompt for _, prompt, _, _ in samples]
    responses = [response for _, _, response, _ in samples]
    stats = response_stats(measure(model, ref, prompts, responses))
    rewards = reward([prefixes[i] + text for i, _, _, text in samples])

    # entropy is a mean over tokens, the others over responses
    lengths = np.array([len(response) for response in responses])
    result = {"n": len(samples)}
    for name, values, weights in (
        ("reward", rewards, None),
        ("sample_kl", stats["kl"], None),
        ("sample_rkl", stats["rkl"], None),
        ("entropy", stats["entropy"], lengths),
    ):
        result[name], result[name + "_se"] = ratio_mean(values, weights, range(len(samples)))
    rows = []
    for n, (i, _, response, text) in enumerate(samples):
        measured = {name: round(float(stats[name][n]), 4) for name in ("kl", "rkl", "entropy")}
        rows.append({"prompt": prefixes[i], "response": text, "tokens": response, "reward": round(rewards[n], 4),
                     **measured})
    return result, rows


def show_completions(models, tokenizer, prefixes, reward, max_new_tokens, seed):
    """Print each prefix with a completion of each model, {name: model}, and its reward."""
    # the same seed for all, so that they begin alike
    drawn = {}
    for name, model in models.items():
        drawn[name] = complete(model, tokenizer, prefixes, max_new_tokens, 1, seed)
    for i, prefix in enumerate(prefixes):
        print(f"\n{prefix.strip()} ...")
        for name, completions in drawn.items():
            text = completions[i][3]
            print(f"  {name:9} {reward([prefix + text])[0]:+.2f} |{text}")


def read_log(folder, step=float("inf")):
    """The lines of a run's log up to a step, parsed; nothing behind a line that was cut."""
    path = os.path.join(folder, "log.jsonl")
    if not os.path.exists(path):
        return []
    # a kill may have cut the last line
    lines = []
    for line in open(path, encoding="utf-8", errors="replace"):
        try:
            record = json.loads(line)
            if record["step"] <= step:
                lines.append(record)
        except (ValueError, KeyError, TypeError):
            break
    return lines


# -----------------------------------------------------------------------------
# the script: a table and a figure

SCORES = ("reward", "sample_rkl", "sample_kl", "entropy")
# Student's t, the 97.5 % quantile for 2 to 16 values
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


# what a run's line in a table does not depend on
OWN = ("seed", "out_dir", "resume", "overwrite", "device", "compile", "micro_tokens", "checkpoint_activations",
       "wandb_log", "log_interval", "max_steps")
# what of tdpo.py makes the objective
OBJECTIVE = ("sum_tokens", "margin", "preference_loss")


def objective_of(folder):
    """The code of the objective in a folder's tdpo.py, without its comments; "" where there is none."""
    path = os.path.join(folder, "tdpo.py")
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    return "\n".join(ast.unparse(part) for part in tree.body if getattr(part, "name", None) in OBJECTIVE)


def short_hash(*values):
    """A short hash of values that json takes."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def from_log(folder, run):
    """What table and figure need of a run with these options: its evaluations, its training pairs' KLs, its last
    scores, and what tells which runs are its seeds (setting), have its reference (origin), began as it did (pair)."""
    # evaluations with samples
    log = read_log(folder)
    evals, pair = [], None
    for record in log:
        if "eval_reward" not in record:
            continue
        values = {"step": record["step"], "n": record["eval_n"]}
        for name in SCORES:
            values[name] = round(record["eval_" + name], 5)
            values[name + "_se"] = round(record[f"eval_{name}_se"], 5)
        # each sample's, which pair runs by prefix
        path = os.path.join(folder, "evals", f"{record['step']}.jsonl")
        if os.path.exists(path):
            samples = [json.loads(line) for line in open(path, encoding="utf-8")]
            values["rewards"] = [round(sample["reward"], 3) for sample in samples]
            values["rkls"] = [round(sample["rkl"], 2) for sample in samples]
            # the same prefixes, completed alike at the start: the same model, length and random numbers
            if not evals:
                pair = short_hash([[sample["prompt"], sample["tokens"]] for sample in samples],
                              os.path.basename(run["reward"]))
        evals.append(values)
    if len(evals) < 2:
        sys.exit(f"error: {folder} has logged no evaluation after its first")

    # a point of a curve is the mean of ten steps
    steps = [record for record in log if "kl_w" in record]
    curves = []
    for begin in range(0, len(steps), 10):
        block = steps[begin:begin + 10]
        point = {"step": block[-1]["step"]}
        for name in ("kl_w", "kl_l", "kl_gap"):
            mean = np.mean([record[name] for record in block])
            point[name] = round(float(mean), 4)
        curves.append(point)

    # each seed may have a model of its own: reviews-sft-1, 1-sft
    shared = {name: value for name, value in run.items() if name not in OWN}
    for name in ("init_from", "ref_from"):
        shared[name] = re.sub(rf"-{run['seed']}$|(?<![^/]){run['seed']}-(?=[^/]*$)", "", run[name])
    last = {name: x for name, x in evals[-1].items() if name not in ("rewards", "rkls")}
    return {
        "run": folder, "seed": run["seed"], **last, "pair": pair,
        "setting": short_hash(shared, last["step"], objective_of(folder)),
        "origin": short_hash(*[shared[name] for name in ("data", "init_from", "reward", "texts")]),
        "evals": evals, "curves": curves,
    }


def label_of(policy, run, others):
    """The name of a run's line: its method's, its directory's without a seed in front, or its directory; the first that
    others have only where they are other seeds of the same."""
    label = run["method"]
    if run["method"] == "tdpo2":
        label += f" α={run['alpha']:g}"
    if run["beta"] != 0.1:
        label += f" β={run['beta']:g}"
    labels = [label, re.sub(r"^\d+-", "", os.path.basename(policy["run"])), policy["run"]]
    # an edited objective is none of the paper's
    if objective_of(policy["run"]) not in ("", objective_of(os.path.dirname(os.path.abspath(__file__)))):
        labels.pop(0)
    for label in labels:
        if are_seeds(label, policy, others):
            break
    return label


def are_seeds(label, policy, others):
    """Whether all others of this label are other seeds of the same."""
    same = [r for r in others if r["label"] == label]
    return all(r.get("setting") == policy.get("setting") and r["seed"] != policy["seed"] for r in same)


def references(policies):
    """What the policies began with, one for each seed: the scores of the first evaluation, where it is the reference's.
    Those of another task or model have a line of their own."""
    found, names = {}, {}
    for r in policies:
        if not r["evals"] or abs(r["evals"][0]["sample_rkl"]) > 1e-4:
            continue
        origin = r.get("origin")
        names.setdefault(origin, f"reference of {r['label']}" if names else "reference")
        first = {**r["evals"][0], "run": r["run"], "label": names[origin], "seed": r["seed"], "evals": [], "curves": []}
        found.setdefault((origin, r["seed"]), first)
    return list(found.values())


def interval(values, errors):
    """(mean, half of a 95 % interval) over seeds: Student's t, or the interval over samples, from their standard
    errors, where that is wider: two seeds can agree by chance."""
    n = len(values)
    half = 1.96 * np.linalg.norm(errors) / n
    if n > 1:
        t = T975[min(n - 2, len(T975) - 1)]
        half = max(half, t * np.std(values, ddof=1) / n**0.5)
    return float(np.mean(values)), float(half)


def reward_at(kls, rewards, level):
    """Rewards (R,) at which R curves, kls and rewards (R, evaluations), joined by straight lines, first cross KL(policy
    || ref) = level; NaN where one does not."""
    found = np.full(len(kls), np.nan)
    # the first line is written last
    for k in range(kls.shape[1] - 2, -1, -1):
        a, b = kls[:, k], kls[:, k + 1]
        crosses = (np.minimum(a, b) <= level) & (level <= np.maximum(a, b)) & (a != b)
        share = (level - a[crosses]) / (b - a)[crosses]
        found[crosses] = rewards[crosses, k] + share * (rewards[:, k + 1] - rewards[:, k])[crosses]
    return found


@functools.lru_cache
def drawn_prefixes(n, draws):
    """How often each of n prefixes is in a draw of n of them (draws + 1, n); in the first draw each is once."""
    rng = np.random.default_rng(n)
    return np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), draws)])


def compare(runs, others, level, draws=2000):
    """((mean, low, high, t) or None, reached): the mean over runs of the reward at KL(policy || ref) = level, less
    that of the run in others, {pair: run} or None, that began alike; None but where all runs reach the level. low and
    high: the 95 % interval of a bootstrap that draws seeds and, for each, prefixes, the same for both runs; t: half of
    Student's over the seeds, the wider one where seeds differ, NaN for one."""
    found = []
    for run in runs:
        pair = [run] if others is None else [run, others[run["pair"]]]
        if not all(r["evals"] and all("rewards" in e for e in r["evals"]) for r in pair):
            continue
        counts = drawn_prefixes(run["n"], draws)
        curves = []
        for r in pair:
            kls = counts @ np.array([e["rkls"] for e in r["evals"]]).T / run["n"]
            rewards = counts @ np.array([e["rewards"] for e in r["evals"]]).T / run["n"]
            curves.append(reward_at(kls, rewards, level))
        difference = curves[0]
        if others is not None:
            difference = curves[0] - curves[1]
        # not by a hair
        if np.isfinite(difference[0]) and np.isfinite(difference).mean() >= 0.95:
            found.append(difference)

    # those that come as far are the ones that move fast: no mean of a part
    n = len(found)
    if n < len(runs):
        return None, n
    # seeds, and for each a draw of its prefixes, independent of the others
    found = np.stack(found)
    rng = np.random.default_rng(0)
    seeds = rng.integers(n, size=(draws, n))
    drawn = found[seeds, rng.integers(1, draws + 1, size=seeds.shape)]
    drawn = drawn[np.isfinite(drawn).any(axis=1)]
    low, high = np.percentile(np.nanmean(drawn, axis=1), (2.5, 97.5))
    t = math.nan
    if n > 1:
        t = T975[min(n - 2, len(T975) - 1)] * np.std(found[:, 0], ddof=1) / n**0.5
    return (float(found[:, 0].mean()), float(low), float(high), float(t)), n


def by_label(results):
    """{label: its results}, in order; results that differ in their seed alone have one label."""
    groups = {}
    for result in results:
        groups.setdefault(result["label"], []).append(result)
    return groups


def table(results, levels):
    """Lines of a Markdown table: means and 95 % intervals, one line for the runs that differ in their seed alone."""
    head = ["method", "reward", "KL(π ‖ π_ref)", "KL(π_ref ‖ π)", "entropy"]
    head += [f"reward at KL {level:g}" for level in levels] + ["seeds × samples"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    # a line for each label: the last evaluation of its runs
    for label, runs in by_label(results).items():
        cells = [label]
        for name in SCORES:
            values, errors = [r[name] for r in runs], [r[name + "_se"] for r in runs]
            mean, half = interval(values, errors)
            cells.append(f"{mean:.3f} ± {half:.3f}")
        cells += [compared(runs, None, level) for level in levels]
        cells.append(f"{len(runs)} × {runs[0]['n']}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def differences(results, levels, against):
    """The same of rewards at equal KL, less those of the runs labelled against, of the same seed and prefixes."""
    groups = by_label(results)
    others = {run["pair"]: run for run in groups[against] if run.get("pair")}
    head = ["method"] + [f"less {against} at KL {level:g}" for level in levels]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label, runs in groups.items():
        if label == against or not runs[0]["evals"]:
            continue
        paired = sum(run.get("pair") in others for run in runs)
        cells = [f"– ({paired} of {len(runs)} began alike)"] * len(levels)
        if paired == len(runs):
            cells = [compared(runs, others, level) for level in levels]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return lines


def compared(runs, others, level):
    """A cell of what `compare` finds, or how many of the runs come as far."""
    found, reached = compare(runs, others, level)
    if found is None:
        return f"– ({reached} of {len(runs)})" if reached else "–"
    mean, low, high, t = found
    cell = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    if reached > 1:
        cell += f" ± {t:.3f}"
    return cell


def draw(results, path):
    """Two panels: reward against KL(policy || ref) at every evaluation (Figure 3a), and KL(ref || policy) of the chosen
    and of the rejected training responses over the steps (Figures 1, 3b, 3c); means over seeds."""
    # drawn to a file, no window
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (frontier, curves) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    groups = by_label(results)
    colors = plt.get_cmap("tab10" if len(groups) <= 10 else "tab20").colors
    for number, (label, runs) in enumerate(groups.items()):
        color = colors[number % len(colors)]
        # a point for each evaluation, the mean of all seeds; the reference and models from elsewhere have one
        x, y, errors = [], [], []
        for evals in zip(*[r["evals"] or [r] for r in runs]):
            x.append(np.mean([e["sample_rkl"] for e in evals]))
            mean, half = interval([e["reward"] for e in evals], [e["reward_se"] for e in evals])
            y.append(mean)
            errors.append(half)
        style = dict(marker="o", ms=4)
        if len(x) == 1:
            style = dict(marker="*", ms=12)
        frontier.errorbar(x, y, errors, elinewidth=0.5, color=color, label=label, **style)

        # the same for the curves
        blocks = list(zip(*[r["curves"] for r in runs]))
        steps = [block[0]["step"] for block in blocks]
        for name, line in (("kl_l", "-"), ("kl_w", ":")):
            means = [np.mean([c[name] for c in block]) for block in blocks]
            curves.plot(steps, means, line, color=color)

    # methods differ tenfold in their KLs, and all start at 0
    frontier.set(xlabel="KL(π ‖ π_ref) of samples, nats", ylabel="reward", title="reward against divergence")
    frontier.set_xscale("symlog", linthresh=1)
    figure.legend(loc="outside right center", fontsize=8)
    curves.set(xlabel="step", ylabel="KL(π_ref ‖ π), nats", title="rejected (solid) and chosen (dotted) responses")
    curves.set_yscale("symlog", linthresh=1)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--runs", required=True, help="directories of train.py, or .json (.gz) files that this script "
                        "wrote, commas between; * and ? match; runs that differ in their seed alone share a line")
    parser.add_argument("--score", default="", help="models (directories or hub ids, commas between) to score anew, on "
                        "the first run's prefixes and against its reference")
    parser.add_argument("--eval_prefixes", type=int, default=0, help="--score: test prefixes (as many as the run had)")
    parser.add_argument("--reward", default="", help="--score: another reward than the first run's")
    parser.add_argument("--seed", type=int, default=0, help="--score: seed of the samples (0)")
    parser.add_argument("--device", default=DEVICES[0], choices=DEVICES, help="--score: where")
    parser.add_argument("--at_kl", type=float, nargs="*", default=[1, 2], help="KLs to compare rewards at (1 2)")
    parser.add_argument("--against", nargs="*", default=[], help="also tables of the differences at these KLs from the "
                        "runs of this name, say dpo, paired by seed and prefix")
    parser.add_argument("--out", default="out/frontier", help="writes OUT.json and OUT.png (out/frontier)")
    args = parse(parser)
    if args.eval_prefixes < 0 or args.eval_prefixes == 1 or not 0 <= args.seed < 2**63:
        parser.error("--eval_prefixes must be 2 or more, --seed between 0 and 2^63")
    if not args.score and (args.eval_prefixes or args.reward or args.seed):
        parser.error("--eval_prefixes, --reward and --seed are for --score, and would be ignored")
    writable(parser, args.out + ".json")

    # what this script wrote first, as its labels stand; a pattern is several
    folders = []
    for part in args.runs.split(","):
        folders += sorted(glob.glob(part)) or [part]
    folders = dict.fromkeys(map(os.path.normpath, folders))
    policies, first = [], None
    for folder in sorted(folders, key=lambda x: not x.endswith((".json", ".json.gz"))):
        path = os.path.join(folder, "options.json")
        if folder.endswith((".json", ".json.gz")):
            path = folder
        opener = gzip.open if path.endswith(".gz") else open
        try:
            run = json.load(opener(path, "rt", encoding="utf-8"))
            if isinstance(run, list):           # this script's own
                for result in run:
                    if not {"run", "label", "seed", "n", "evals", "curves", *SCORES} <= result.keys():
                        raise ValueError
                    if result in policies:
                        continue
                    if not are_seeds(result["label"], result, policies):
                        result["label"] += f" of {folder}"
                    policies.append(result)
                continue
            has_reward = run["data"] in TASKS and run["method"] != "sft"
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            parser.error(f"{folder} holds no run of train.py, and nothing that this script wrote")
        if not has_reward:
            parser.error(f"{folder} has no reward: it trained {run['method']} on {run['data']}")
        first = first or run
        policy = from_log(folder, run)
        policy["label"] = label_of(policy, run, policies)
        policies.append(policy)
    labels = by_label(policies)
    for against in args.against:
        if against not in labels:
            parser.error(f"--against={against}: the runs are called {', '.join(labels)}")
    for r in policies:
        if not all("rewards" in e for e in r["evals"]):
            print(f"note: {r['run']} has not kept the samples of all evaluations, so it is not compared at equal KL")

    # checkpoints anew, also those that were trained elsewhere
    scored = {path: load_model(path, args.device) for path in args.score.split(",") if path}
    if scored and first is None:
        parser.error("--score takes prefixes, reward and reference from a run of train.py in --runs")
    if scored:
        reward = load_reward(args.reward or first["reward"], args.device)
        texts = load_texts(first["data"], first["texts"])
    for path, (model, tokenizer) in scored.items():
        ref = load_reference(first["ref_from"] or first["init_from"], model, tokenizer)
        count = args.eval_prefixes or first["eval_prefixes"]
        prefixes = task_prefixes(texts, tokenizer, first["seed"], 0, count)["test"]
        result, _ = score_policy(model, ref, tokenizer, prefixes, reward, first["max_new_tokens"], args.seed)
        policies.append(dict(result, run=path, label=path + " (scored)", seed=args.seed, evals=[], curves=[]))
        pair = {"reference": ref, "policy": model}
        show_completions(pair, tokenizer, prefixes[:3], reward, first["max_new_tokens"], args.seed)

    # the numbers, a table of them, a figure
    lines = [json.dumps(result, ensure_ascii=False) for result in policies]
    with open(args.out + ".json", "w", encoding="utf-8") as f:
        f.write("[" + ",\n".join(lines) + "]\n")
    results = references(policies) + policies
    print("\n" + "\n".join(table(results, args.at_kl)))
    print("\nmean ± half of a 95 % interval, over seeds or, where wider, over samples; at a KL [] is of a bootstrap "
          "over seeds and prefixes, ± over seeds; nats, KLs summed over a response, entropy a mean over its tokens")
    for against in args.against:
        print("\n" + "\n".join(differences(results, args.at_kl, against)))
    print(f"\nwrote {args.out}.json")
    try:
        draw(results, args.out + ".png")
        print(f"wrote {args.out}.png")
    except ImportError:
        print("matplotlib is not installed, so no figure was drawn")
