"""The sentiment task, real (IMDb) and embedded (a seeded grammar of film reviews): texts, prefixes, reward, pairs, evaluation.

    python eval_imdb.py --runs=out/reviews-dpo,out/reviews-tdpo2        # one table, one figure: reward against sequential KL
    python eval_imdb.py --runs='out/sweep/[1-5]-*/' --eval_prefixes=0   # means and intervals over seeds, from the runs' logs
    python eval_imdb.py --runs=out/hh-dpo,out/hh-tdpo2                  # runs on pairs: accuracy, and the entropy of sample.py's samples

Both tasks take the same path; only texts, SFT model and reward differ (paper, Section 5.1; Rafailov et al. 2023, Appendix C.1).
"""
import argparse
import glob
import hashlib
import itertools
import json
import os
import random
import re
import sys

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sample import (DEVICES, autocast, encode_prompt, generate, load_model, load_reference, load_state, parse, read_pairs, read_rows, report_bad,
                    response_stats, tokenize, tokenize_texts, writable)

TASKS = ("reviews", "imdb")

# -----------------------------------------------------------------------------
# The embedded task. A review has a mood (how often its sentiment words are positive); its words are all the grammar's own.
POSITIVE = ("wonderful superb charming brilliant touching gripping clever delightful warm fresh funny moving elegant honest thrilling "
            "loved enjoyed admired praised recommend treasure").split()
NEGATIVE = ("dull awful tedious clumsy boring weak lifeless messy bland stale shallow painful hollow lazy annoying "
            "hated endured regretted mocked avoid forget").split()
GRAMMAR = {
    "review": ["{opening} . {line} . {story} . {line} . {line} . {verdict} ."],
    "opening": ["i saw this {film} with {friend} {when}", "this {film} came out {when}", "we watched this {film} at {place} {when}",
                "{friend} told me about this {film} {when}", "the {film} opens in {place}"],
    "story": ["the story follows a {job} who {does} in {place}", "it is about a {job} and a {job} who meet in {place}",
              "most of it takes place in {place} where a {job} {does}"],
    "line": ["{part} was {very} {adj}", "{part} felt {adj} and {part} seemed {very} {adj}", "i {verb} {part}", "{friend} {verb} {part} too",
             "there is a scene in {place} that i found {very} {adj}", "with {part} so {adj} it is hard to look away from {part}",
             "{part} is {adj} but {part} is {very} {adj}", "even {part} looked {adj} next to {part}"],
    "verdict": ["in the end i would {advice} this {film} to anyone", "all in all a {very} {adj} {film}", "a {adj} and {adj} {film} that i {verb}"],
    "film": ["film", "movie", "picture", "drama", "comedy", "thriller"], "friend": ["my sister", "a friend", "my father", "our neighbour"],
    "when": ["last week", "last night", "years ago", "in the spring", "on a rainy day"], "very": ["very", "quite", "rather", "truly", "simply"],
    "place": ["the city", "a small town", "the old theatre", "the harbour", "the mountains", "a quiet village"],
    "job": ["teacher", "sailor", "doctor", "painter", "detective", "farmer"],
    "does": ["looks for a lost letter", "learns to sing", "hides from the law", "returns after the war", "opens a bakery"],
    "part": ["the acting", "the plot", "the music", "the dialogue", "the ending", "the camera work", "the first half", "the humour",
             "the villain", "the pacing", "the lead actor", "the script"],
    "adj+": POSITIVE[:15], "adj-": NEGATIVE[:15], "verb+": POSITIVE[15:19], "verb-": NEGATIVE[15:19], "advice+": POSITIVE[19:], "advice-": NEGATIVE[19:]}


def write_review(rng):
    """One review of about 60 words. The mood is drawn once, so the words of a review agree more often than not."""
    mood = rng.choice((0.15, 0.5, 0.85))

    def expand(symbol):
        options = GRAMMAR.get(symbol) or GRAMMAR[symbol + ("+" if rng.random() < mood else "-")]
        return re.sub(r"\{(\w+)\}", lambda m: expand(m[1]), rng.choice(options))
    return expand("review")


def exact_reward(texts):
    """The embedded task's reward: (positive - negative) / (positive + negative) words, in [-1, 1]; 0 where there are none."""
    counts = [(sum(w in POSITIVE for w in t.split()), sum(w in NEGATIVE for w in t.split())) for t in texts]
    return [(p - n) / max(1, p + n) for p, n in counts]


def scratch_model(seed):
    """The embedded task's untrained policy: a GPT-2 of 0.1M parameters and its word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = sorted(set(re.sub(r"\{\w+\}", " ", " ".join(itertools.chain(*GRAMMAR.values()))).split()))
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", "<unk>", *words])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>", clean_up_tokenization_spaces=False)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0))
    return model.eval(), tokenizer


# -----------------------------------------------------------------------------
# Both tasks


def load_texts(run):
    """{"train": [...], "test": [...]} review texts of a run's options (data, texts); IMDb's line breaks removed."""
    if run["data"] == "reviews":
        rng = random.Random(0)
        reviews = [write_review(rng) for _ in range(11000)]
        return {"train": reviews[:10000], "test": reviews[10000:]}
    source, local = run["texts"], os.path.exists(run["texts"])
    rows = [(where, row, None) for where, row in read_rows(source)] if local else [
        (where, row, split) for split in ("train", "test") for where, row in read_rows(source, split)]
    texts, bad = {"train": [], "test": []}, []
    for n, (where, row, split) in enumerate(rows):
        if isinstance(row, str) or not isinstance(row.get("text"), str) or not row["text"].strip():
            bad.append(f"{where} {row if isinstance(row, str) else 'has no text in a column text'}")
            continue
        split = split or row.get("split") or ("test" if n % 10 == 9 else "train")       # without splits every tenth is for testing
        if not isinstance(split, str) or any("\ud800" <= c <= "\udfff" for c in row["text"]):
            bad.append(f"{where} has {'half a surrogate pair in its text' if isinstance(split, str) else 'a split that is no text'}")
            continue
        if split in texts:
            texts[split].append(re.sub(r"\s+", " ", re.sub(r"<br\s*/?>", " ", row["text"])).strip())
    report_bad(source, bad, len(rows), run["strict"], "a row is a text, and a split of train or test")
    for split, found in texts.items():
        if not found:
            sys.exit(f"error: {source} has no text in its {split} split; the column split names train or test")
        random.Random(0).shuffle(found)             # IMDb is sorted by label
    return texts


def task_prefixes(run, tokenizer, texts=None):
    """{"train": [...], "test": [...]}: beginnings of 2 to 8 tokens, train_prefixes and eval_prefixes of them, each from its own review."""
    prefixes = {}
    for split, reviews in (texts or load_texts(run)).items():
        rng = random.Random(f"{run['seed']} {split}")
        n = min(len(reviews), run["train_prefixes" if split == "train" else "eval_prefixes"])
        prefixes[split] = []
        for text in rng.sample(reviews, n):
            ids, length = tokenizer(" ".join(text.split()[:16]), add_special_tokens=False)["input_ids"], rng.randint(2, 8)
            while length < len(ids) and tokenizer.decode(ids[:length]).endswith("\ufffd"):         # inside a character
                length += 1
            prefixes[split].append(tokenizer.decode(ids[:length]))
    return prefixes


def load_reward(name, device="cpu"):
    """A function texts -> list of rewards: "exact" (the embedded task's), or P(positive) under a text-classification model."""
    if name == "exact":
        return exact_reward
    model, tokenizer = load_model(name, device, AutoModelForSequenceClassification)
    positive = [i for i, label in model.config.id2label.items() if str(label).lower().startswith("pos")]
    if len(positive) != 1:
        sys.exit(f"error: the reward model {name} has labels {sorted(map(str, model.config.id2label.values()))}; one must be called positive")
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id          # a decoder finds a text's last token by it
    longest = min(512, getattr(model.config, "max_position_embeddings", None) or 512)

    @torch.no_grad()
    def reward(texts):
        scores, order = [0.0] * len(texts), sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for begin in tqdm(range(0, len(order), 64), desc="scoring", leave=False, disable=None):
            batch = order[begin:begin + 64]
            inputs = tokenizer([texts[i] for i in batch], padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
            with autocast(device, "bfloat16" if torch.device(device).type == "cuda" else "float32"):
                probabilities = model(**inputs).logits.float().softmax(-1)[:, positive[0]]
            for i, p in zip(batch, probabilities.tolist()):
                scores[i] = p
        return scores
    try:
        reward(["good", "good " * 600])
    except Exception as error:      # before hours of sampling
        sys.exit(f"error: the reward model {name} cannot score texts: {type(error).__name__}: {error}")
    return reward


def complete(model, tokenizer, prefixes, max_new_tokens, num_samples, seed):
    """Sampled completions (temperature 1, no nucleus) as flat lists: index of the prefix, prompt ids, response ids, response text."""
    prompts = [encode_prompt(tokenizer, x) for x in prefixes]
    drawn = generate(model, tokenizer, prompts, max_new_tokens, num_samples, seed=seed)
    return [(i, prompts[i], new, response_text(tokenizer, prompts[i], new)) for i, responses in enumerate(drawn) for new in responses]


def response_text(tokenizer, prompt, response):
    """The response as text: what it adds to the decoded prompt, so that prompt + response reads as one text."""
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(prompt + response, skip_special_tokens=True)[len(start):]


def build_pairs(run, model, tokenizer, prefixes, reward, dtype="float32"):
    """The preference pairs of a sentiment run as a .jsonl beside its out_dir (prompt, chosen, rejected, chosen_score, rejected_score).

    `completions` samples of the SFT model for each training prefix; every two of them make a pair, the higher reward is chosen;
    pairs closer than min_score_gap are dropped. The file's name holds a hash of all that made it, so it is reused while that is
    unchanged. Returns its path.
    """
    folder = os.path.dirname(run["out_dir"]) or "."
    judge = [(f, os.path.getsize(f), os.path.getmtime(f)) for f in sorted(glob.glob(os.path.join(glob.escape(run["reward"]), "*")))]
    made_of = [prefixes, judge, *(run[k] for k in ("reward", "completions", "min_score_gap", "max_new_tokens", "seed")), dtype]
    digest = hashlib.sha256(json.dumps(made_of).encode())
    for p in model.parameters():
        digest.update(p.detach().cpu().contiguous().numpy())
    path = os.path.join(folder, f"{run['data']}-pairs-{digest.hexdigest()[:12]}.jsonl")
    if os.path.exists(path):
        print(f"pairs: reusing {path}")
        return path
    print(f"pairs: sampling {run['completions']} completions for each of {len(prefixes)} prefixes, reward {run['reward']}", flush=True)
    with autocast(model.device, dtype):
        samples = complete(model, tokenizer, prefixes, run["max_new_tokens"], run["completions"], run["seed"])
    scores = reward([prefixes[i] + text for i, _, _, text in samples])
    rows, tried = [], 0
    for i, group in itertools.groupby(zip(samples, scores), key=lambda x: x[0][0]):
        for (a, score_a), (b, score_b) in itertools.combinations(group, 2):
            tried += 1
            if abs(score_a - score_b) > max(0, run["min_score_gap"]) and a[3].strip() and b[3].strip() and a[3] != b[3]:
                (w, score_w), (l, score_l) = sorted(((a[3], score_a), (b[3], score_b)), key=lambda x: -x[1])
                rows.append(dict(prompt=prefixes[i], chosen=w, rejected=l, chosen_score=score_w, rejected_score=score_l))
    print(f"pairs: {len(rows)} of {tried} kept, score gap over {run['min_score_gap']}; mean reward of the samples {np.mean(scores):+.3f}")
    if not rows:
        sys.exit(f"error: every pair was dropped: no two completions differ by more than min_score_gap={run['min_score_gap']}; lower --min_score_gap")
    os.makedirs(folder, exist_ok=True)
    with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(f"{path}.{os.getpid()}", path)
    return path


def training_data(run, model, tokenizer, score, dtype):
    """What a run trains on and what it holds out: examples and held_out, lists of (prompt, chosen, rejected) token ids; names, where each example
    comes from; the sentiment task's prefixes for evaluation; how many pairs were truncated, and dropped. model draws the task's completions."""
    length, sft, task, seed = run["max_length"], run["method"] == "sft", run["data"] in TASKS, run["seed"]
    positions = getattr(model.config, "max_position_embeddings", None) or length
    if length > positions:
        sys.exit(f"error: --max_length={length} is more than the {positions} positions of {run['init_from']}; use --max_length={positions} or less")
    if tokenizer.eos_token_id is None:
        sys.exit(f"error: the tokenizer of {run['init_from']} has no EOS token, which ends every response; set eos_token in its tokenizer_config.json")
    prefixes = task_prefixes(run, tokenizer) if task and not sft else {"test": []}
    if task and sft:
        texts = load_texts(run)
        examples, held_out = (tokenize_texts(x, tokenizer, length) for x in (texts["train"], texts["test"][:run["eval_pairs"]]))
        names, truncated, dropped = [f"text {n}" for n in range(len(examples))], 0, 0
    else:
        source = build_pairs(run, model, tokenizer, prefixes["train"], score, dtype) if task else run["data"]
        pairs = read_pairs(source, tokenizer, "train", run["strict"])
        if run["eval_data"] or source == "hh":
            held_pairs = read_pairs(run["eval_data"] or "hh", tokenizer, "test", run["strict"])
        else:
            prompts = sorted({p[1] for p in pairs})
            held = set([prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))][:max(1, min(run["eval_pairs"], len(prompts) // 10))])
            pairs, held_pairs = [p for p in pairs if p[1] not in held], [p for p in pairs if p[1] in held]
            if not pairs:
                sys.exit("error: all pairs share one prompt, so none can be held out; name held-out pairs with --eval_data")
        held_pairs = [held_pairs[i] for i in np.random.default_rng(seed).permutation(len(held_pairs))[:run["eval_pairs"]]]
        (examples, kept, truncated), (held_out, _, _) = (
            tokenize(x, tokenizer, length, run["max_prompt_length"], run["truncation"]) for x in (pairs, held_pairs))
        names, dropped = [pairs[i][0] for i in kept], len(pairs) - len(examples)
    if not examples or not held_out:
        sys.exit(f"error: every {'held-out' if examples else 'training'} pair was dropped: within --max_length={length} no two responses differ as tokens; "
                 "raise --max_length, or take a tokenizer that knows these words")
    if sft:
        examples, held_out = ([(p, c, []) for p, c, _ in x] for x in (examples, held_out))
    return examples, held_out, names, prefixes["test"], truncated, dropped


def score_policy(model, ref, tokenizer, prefixes, reward, max_new_tokens, seed=0, dtype="float32"):
    """One sample for each test prefix: {reward, sample_kl, sample_rkl, entropy, their standard errors (name_se), n}."""
    with autocast(model.device, dtype):
        samples = complete(model, tokenizer, prefixes, max_new_tokens, 1, seed)
    stats = response_stats(model, ref, [s[1] for s in samples], [s[2] for s in samples])        # fp32: bf16 logits would inflate a small KL
    scores = reward([prefixes[i] + text for i, _, _, text in samples])
    lengths = np.array([len(s[2]) for s in samples])
    entropy = np.average(stats["entropy"], weights=lengths)                                     # the mean over tokens of all responses
    entropies = entropy + lengths / lengths.mean() * (stats["entropy"] - entropy)               # of this mean; its spread is the ratio's
    result = {"n": len(samples)}
    for name, values in (("reward", scores), ("sample_kl", stats["kl"]), ("sample_rkl", stats["reverse_kl"]), ("entropy", entropies)):
        result[name], result[name + "_se"] = float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)
    return result


def run_options(folder):
    """The options of the train.py run in a directory; {} where there is none."""
    try:
        options = json.load(open(os.path.join(folder, "options.json"), encoding="utf-8"))
        return options if {"data", "eval_data", "method", "init_from", "ref_from", "reward", "max_new_tokens", "seed", "alpha", "beta", "strict"} <= set(options) else {}
    except (OSError, ValueError, TypeError):
        return {}


def read_log(folder, step=float("inf")):
    """The lines of a run's log up to a step, parsed; nothing behind a line that was cut."""
    lines, path = [], os.path.join(folder, "log.jsonl")
    for line in open(path, encoding="utf-8", errors="replace") if os.path.exists(path) else ():
        try:
            record = json.loads(line)
            if record["step"] <= step:
                lines.append(record)
        except (ValueError, KeyError, TypeError):
            break
    return lines


def start_log(folder, options, step, resume):
    """The open log of a run, and its options.json. A resumed log keeps its lines up to the step, without one that was cut; a new run removes the
    checkpoint of one that it replaces, so none ever lies beside another run's log."""
    lines, path = [json.dumps(x) + "\n" for x in read_log(folder, step)] if resume else [], os.path.join(folder, "log.jsonl")
    for name in [] if resume else os.listdir(folder):
        if name in ("config.json", "model.safetensors", "samples.jsonl", "chat_template.jinja", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
                    "vocab.json", "vocab.txt", "merges.txt") or name.startswith(("training_state-", "tokenizer")):
            os.remove(os.path.join(folder, name))
    for file, text in ((os.path.join(folder, "options.json"), json.dumps(options, indent=1)), (path, "".join(lines))):
        with open(file + ".new", "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(file + ".new", file)
    return open(path, "a", encoding="utf-8", buffering=1)


SCORES = ("reward", "sample_kl", "sample_rkl", "entropy")
CURVES = ("kl_w", "kl_l", "kl_gap", "rkl_w", "rkl_l", "rkl_gap")
# Student's t for 2 to 16 values
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def from_log(folder):
    """What the figures need of a run: its evaluations, and the training pairs' KLs as means over every 10 steps."""
    log = read_log(folder)
    steps = [x for x in log if "kl_w" in x]
    return dict(evals=[{k.removeprefix("eval_"): round(v, 5) for k, v in x.items()} for x in log if "eval_reward" in x],
                curves=[{"step": block[-1]["step"], **{k: round(float(np.mean([x[k] for x in block])), 4) for k in CURVES}}
                        for block in (steps[n:n + 10] for n in range(0, len(steps), 10))])


def interval(values, errors=()):
    """(mean, half of a 95 % interval): Student's t over seeds, or the interval over samples, from their standard errors, where that is wider:
    two seeds can agree by chance."""
    half = 1.96 * float(np.sqrt(np.sum(np.square(errors)))) / len(values) if len(errors) else float("nan")
    if len(values) > 1:
        half = np.fmax(half, np.std(values, ddof=1) / len(values) ** 0.5 * T975[min(len(values) - 2, len(T975) - 1)])
    return float(np.mean(values)), float(half)


def reward_at(evals, level):
    """(reward, its standard error) where a run's evaluations, joined by straight lines, first cross KL(policy || ref) = level; None without a crossing.
    Both ends share their prefixes, so their errors are taken as fully correlated."""
    for a, b in zip(evals, evals[1:]):
        if min(a["sample_rkl"], b["sample_rkl"]) <= level <= max(a["sample_rkl"], b["sample_rkl"]) and a["sample_rkl"] != b["sample_rkl"]:
            share = (level - a["sample_rkl"]) / (b["sample_rkl"] - a["sample_rkl"])
            return tuple(a[k] + share * (b[k] - a[k]) for k in ("reward", "reward_se"))


def groups(results):
    """{label: its results}, in order; results that differ in their seed alone have one label."""
    return {label: [r for r in results if r["label"] == label] for label in dict.fromkeys(r["label"] for r in results)}


def table(results, levels):
    """The lines of the README's table: means and 95 % intervals, the reward at matched KLs, one line for the runs that differ in their seed alone."""
    lines = ["| method | reward | KL(π ‖ π_ref) | KL(π_ref ‖ π) | entropy | " + "".join(f"reward at KL {x:g} | " for x in levels) + "seeds × samples |", "|---" * (6 + len(levels)) + "|"]
    for label, runs in groups(results).items():
        cells = ["{:.3f} ± {:.3f}".format(*interval([r[k] for r in runs], [r[k + "_se"] for r in runs])) for k in ("reward", "sample_rkl", "sample_kl", "entropy")]
        for level in levels:
            reached = [x for r in runs if (x := reward_at(r["evals"], level)) is not None]
            cells.append("{:.3f} ± {:.3f}".format(*interval(*zip(*reached))) if reached else "–")
            cells[-1] += f" ({len(reached)} of {len(runs)})" * (0 < len(reached) < len(runs))
        lines.append(f"| {label} | {' | '.join(cells)} | {len(runs)} × {runs[0]['n']} |")
    return lines


def preference_result(folder, label, seed):
    """What the paper's Table 1 has of a run on pairs: accuracy on what it held out, from its log, and the predictive entropy of its samples.jsonl
    (sample.py --num_samples=25): means over tokens, their standard errors over prompts."""
    found = [x for x in read_log(folder) if "eval_acc" in x and "eval_pairs" in x]
    last = found[-1] if found else sys.exit(f"error: {folder} has logged no evaluation of held-out pairs")
    result = dict(run=folder, label=label, seed=seed, step=last["step"], **{k: last["eval_" + k] for k in ("pairs", "acc", "acc_loss", "kl_w", "kl_l")})
    result.update({k + "_se": (result[k] * (1 - result[k]) / result["pairs"]) ** 0.5 for k in ("acc", "acc_loss")})
    path = os.path.join(folder, "samples.jsonl")
    rows = [json.loads(line) for line in open(path, encoding="utf-8")] if os.path.exists(path) else []
    for name in ("entropy", "surprisal"):
        sums = {}
        for row in rows:
            if row["model"] == "policy":
                sums[row["prompt"]] = sums.get(row["prompt"], 0) + np.array([row[name], 1]) * row["tokens"]
        if len(sums) > 1:
            total, tokens = np.array(list(sums.values())).T
            mean = total.sum() / tokens.sum()
            spread = ((total - mean * tokens) ** 2).sum() * len(sums) / (len(sums) - 1)
            result.update({name: float(mean), name + "_se": float(spread ** 0.5 / tokens.sum()), "prompts": len(sums)})
    return result


def preference_table(results):
    """The lines of the README's table of runs on pairs; 95 % intervals over pairs and over prompts."""
    lines = ["| method | acc | acc_loss | D chosen | D rejected | entropy | −log p | pairs | prompts |", "|---" * 9 + "|"]
    for r in results:
        of_prompts = T975[min(r.get("prompts", 2) - 2, len(T975) - 1)]
        cells = [f"{r[k]:.3f} ± {t * r[k + '_se']:.3f}" if k in r else "–" for k, t in (("acc", 1.96), ("acc_loss", 1.96), ("entropy", of_prompts), ("surprisal", of_prompts))]
        lines.append(f"| {r['label']} | {cells[0]} | {cells[1]} | {r['kl_w']:.3f} | {r['kl_l']:.3f} | {cells[2]} | {cells[3]} | {r['pairs']} | {r.get('prompts', '–')} |")
    return lines


def draw(results, path):
    """Figure 3(a), reward against KL at every evaluation, and Figures 1, 3(b-d) and 6, the KL of chosen and rejected training responses and their gap:
    means and 95 % intervals over seeds. Above KL(policy || ref), which the paper plots, below KL(ref || policy), which its loss has."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 4, figsize=(18, 8), constrained_layout=True)
    for number, (label, runs) in enumerate(groups(results).items()):
        style = dict(color=f"C{number % 10}", label=label)
        for row, r in zip(axes, ("r", "")):
            at = list(zip(*(run["evals"] or [run] for run in runs)))        # by step, over seeds; the reference and models from elsewhere have one point
            (x, dx), (y, dy) = (zip(*(interval([e[k] for e in step], [e[k + "_se"] for e in step]) for step in at)) for k in (f"sample_{r}kl", "reward"))
            row[0].errorbar(x, y, xerr=dx, yerr=dy, marker="o" if runs[0]["evals"] else "*", ms=4 if runs[0]["evals"] else 12, capsize=2, lw=1, elinewidth=0.6, **style)
            for axis, name in zip(row[1:], ("kl_w", "kl_l", "kl_gap")):
                if at := list(zip(*(run["curves"] for run in runs))):
                    mean, half = (np.array(x) for x in zip(*(interval([c[r + name] for c in step], [0] * len(step)) for step in at)))
                    steps = [step[0]["step"] for step in at]
                    axis.plot(steps, mean, lw=1.2, **style)
                    axis.fill_between(steps, mean - half, mean + half, alpha=0.15, color=style["color"], lw=0)
    for row, kl in zip(axes, ("KL(π ‖ π_ref)", "KL(π_ref ‖ π)")):
        row[0].set(xlabel=f"{kl} of samples, nats (linear up to 1)", ylabel="reward", title=f"reward against {kl}")
        row[0].set_xscale("symlog", linthresh=1)        # methods differ tenfold in their KLs, and all start at 0
        for axis, title in zip(row[1:], ("chosen", "rejected", "gap |rejected - chosen|")):
            axis.set(xlabel="step", ylabel="nats (linear up to 1)", title=f"{kl}, {title}")
            axis.set_yscale("symlog", linthresh=1)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--runs", required=True, help="directories of train.py runs, separated by commas; * and ? match; runs that differ in their seed alone share a line")
    parser.add_argument("--also", default="", help="models trained elsewhere (directories or hub ids), scored on the first run's prefixes against its reference")
    parser.add_argument("--eval_prefixes", type=int, default=512, help="test prefixes, one sample each (default 512); 0 takes the last evaluation that each run has logged")
    parser.add_argument("--at_kl", default="1,2", help="KLs at which the methods' rewards are compared, interpolated between evaluations (default 1,2)")
    parser.add_argument("--reward", default="", help="score with another reward than the one trained on: exact, a directory or hub id")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--device", default=DEVICES[0], choices=DEVICES)
    parser.add_argument("--out", default="out/frontier", help="writes OUT.json and OUT.png (default out/frontier)")
    args = parse(parser)
    folders = [x for part in args.runs.split(",") if part for x in sorted(map(os.path.normpath, glob.glob(part))) or [os.path.normpath(part)]]
    runs = {folder: run_options(folder) for folder in folders}
    if not runs or not 0 <= args.seed < 2**63:
        parser.error("--runs names no directory" if not runs else "--seed must be between 0 and 2^63")
    name_of = lambda run: run["method"] + f" α={run['alpha']:g}" * (run["method"] == "tdpo2") + f" β={run['beta']:g}" * (run["beta"] != 0.1)
    if all(run.get("data", "reviews") not in TASKS and run["method"] != "sft" for run in runs.values()):
        if args.also or args.reward:
            parser.error("--also and --reward are for runs with a reward, not for runs on pairs")
        results = [preference_result(folder, name_of(run), run["seed"]) for folder, run in runs.items()]
        print("\n".join(preference_table(results)))
        with open(writable(parser, args.out + ".json"), "w", encoding="utf-8") as f:
            json.dump(results, f, indent=1)
        sys.exit()
    for folder, run in runs.items():
        if run.get("data") not in TASKS:
            parser.error(f"{folder} holds no run of train.py on {' or '.join(TASKS)}")
        if not os.path.exists(os.path.join(folder, "config.json")):
            parser.error(f"{folder} has no checkpoint yet; let train.py finish or continue it with --resume=True")
    if args.eval_prefixes < 2 and (args.eval_prefixes or args.also or args.reward):
        parser.error("--eval_prefixes must be 2 or more; 0, which takes what the runs have logged, goes without --also and --reward")
    try:
        levels = [float(x) for x in args.at_kl.split(",") if x]
    except ValueError:
        parser.error(f"--at_kl={args.at_kl}: expected numbers separated by commas")
    writable(parser, args.out + ".json")

    first = next(iter(runs.values()))
    runs.update({folder: {**first, "method": "elsewhere", "ref_from": first["ref_from"] or first["init_from"]} for folder in args.also.split(",") if folder})
    results, references, settings = [], {}, {}
    for folder, run in runs.items():
        elsewhere, source = run["method"] == "elsewhere", run["ref_from"] or run["init_from"] if run["method"] != "sft" else folder
        label = os.path.basename(folder) if elsewhere else name_of(run)
        setting = {k: v for k, v in run.items() if k not in ("seed", "init_from", "ref_from", "out_dir", "resume", "overwrite", "device", "compile", "micro_tokens", "wandb_log", "log_interval")}
        if settings.setdefault(label, setting) != setting or any((r["label"], r["seed"]) == (label, run["seed"]) for r in results):
            label = folder                  # it differs in more than its seed from runs of this label, or not even in that
        logged = from_log(folder) if not elsewhere else dict(evals=[], curves=[])
        if args.eval_prefixes == 0:
            if len(logged["evals"]) < 2:
                parser.error(f"{folder} has logged no evaluation after its first")
            score = lambda evaluation: {k: v for k, v in evaluation.items() if k in ("n", *SCORES, *(x + "_se" for x in SCORES))}
            of_reference, of_policy = logged["evals"][0], logged["evals"][-1]
        else:
            reward = load_reward(args.reward or run["reward"], args.device)
            model, tokenizer = load_model(folder, args.device)
            of_reference, of_policy = load_reference(source, model, tokenizer), model
            prefixes, dtype = task_prefixes({**run, "eval_prefixes": args.eval_prefixes}, tokenizer)["test"], "bfloat16" if args.device == "cuda" else "float32"
            score = lambda m: score_policy(m, of_reference, tokenizer, prefixes, reward, run["max_new_tokens"], args.seed, dtype)
        if (source, run["seed"]) not in references:
            references[source, run["seed"]] = dict(run=source, label="reference", seed=run["seed"], step=0, **score(of_reference), evals=[], curves=[])
        if source != folder:
            results.append(dict(run=folder, label=label, seed=run["seed"], step=None if elsewhere else load_state(folder)["step"], **score(of_policy), **logged))
    results = [*references.values(), *results]
    with open(args.out + ".json", "w", encoding="utf-8") as f:
        f.write("[" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in results) + "]\n")
    print("\n" + "\n".join(table(results, levels)))
    print("\nmean ± half of a 95 % interval, over seeds or, where wider, over samples; KLs are sums over a response, entropy a mean over its tokens, "
          f"in nats. Wrote {args.out}.json")
    try:
        draw(results, args.out + ".png")
        print(f"wrote {args.out}.png")
    except ImportError:
        print("matplotlib is not installed, so no figure was drawn")
