"""The sentiment task, real (IMDb) and embedded (a seeded grammar of film reviews): texts, reward, pairs, scores.

    python eval_imdb.py --runs=out/reviews-dpo,out/reviews-tdpo2            # a table and a figure from the runs' logs
    python eval_imdb.py --runs=out/reviews-dpo --score=out/reviews-dpo,DIR  # scores checkpoints anew, from anywhere

Both take the same path; only texts, SFT model and reward differ (paper, Section 5.1; Rafailov et al. 2023, App. C.1).
`python -m extras.compare` compares methods over several seeds.
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast,
                          pipeline)

from sample import (DEVICES, encode_prompt, generate, load_model, load_reference, measure, parse, positions_of,
                    printable, ratio_mean, reason_of, reference_of, response_stats, response_text, writable,
                    write_lines)

TASKS = ("reviews", "imdb")

# -----------------------------------------------------------------------------
# the embedded task: a review has a mood, how often its sentiment words are positive; all its words are the grammar's

# symbol -> what it may become, with other symbols in braces; "adj+" and so on are the words of a good mood
with open(os.path.join(os.path.dirname(__file__), "assets", "grammar.json"), encoding="utf-8") as f:
    GRAMMAR = json.load(f)
POSITIVE = GRAMMAR["adj+"] + GRAMMAR["verb+"] + GRAMMAR["advice+"]
NEGATIVE = GRAMMAR["adj-"] + GRAMMAR["verb-"] + GRAMMAR["advice-"]


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

    source (imdb): a .parquet or .jsonl file with columns text and split (without split, every tenth text is for
    testing), or a directory or hub id with these splits. Ends the program with one sentence if there are no texts.
    """
    if data == "reviews":
        rng = random.Random(0)
        reviews = [write_review(rng) for _ in range(11000)]
        return {"train": reviews[:10000], "test": reviews[10000:]}

    # imported here, because it takes seconds and the embedded task does without
    from datasets import load_dataset
    try:
        if os.path.isfile(source):
            kind = "parquet" if source.endswith(".parquet") else "json"
            rows = load_dataset(kind, data_files=glob.escape(source), split="train")
        else:
            rows = []
            for split in ("train", "test"):
                rows += [{**row, "split": split} for row in load_dataset(source, split=split)]
    except Exception as error:      # the readers of datasets raise all kinds of errors
        sys.exit(f"error: cannot read the texts in {source}: {reason_of(error)}; --texts takes a .parquet or .jsonl "
                 "file, a directory or a hub id")

    # one line each, and rows without text are left out
    texts = {"train": [], "test": []}
    for n, row in enumerate(rows):
        split = row.get("split", "test" if n % 10 == 9 else "train")
        text = row.get("text")
        if split in texts and isinstance(text, str) and text.strip():
            text = re.sub(r"<br\s*/?>", " ", text)
            texts[split].append(re.sub(r"\s+", " ", text).strip())
    print(f"texts: {len(texts['train'])} to train on, {len(texts['test'])} to test on, of {len(rows)} rows in {source}")
    for split in texts:
        if not texts[split]:
            sys.exit(f"error: {source} has no text in its {split} split; the column split names train or test")
        # IMDb is sorted by label
        random.Random(0).shuffle(texts[split])
    return texts


def task_prefixes(texts, tokenizer, seed, train_prefixes, eval_prefixes):
    """{"train": [...], "test": [...]}: beginnings of 2 to 8 tokens, each of a different review, as text. The
    other arguments say how many of each."""
    # each split has a generator of its own, so that the size of one does not change the other
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
    with a label called positive. Ends the program with one sentence if the model cannot score texts."""
    if name == "exact":
        return exact_reward
    model, tokenizer = load_model(name, device, AutoModelForSequenceClassification)
    labels = {i: str(label) for i, label in model.config.id2label.items()}
    positive = [i for i, label in labels.items() if label.lower().startswith("pos")]
    if len(positive) != 1:
        labels = sorted(labels.values())
        sys.exit(f"error: the reward model {name} has labels {labels}; one must be called positive")
    # a decoder finds the last token of a text by the padding that follows it
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    longest = min(512, getattr(model.config, "max_position_embeddings", None) or 512)
    wanted = model.config.id2label[positive[0]]

    def score(texts):
        # made for each call, because on a GPU it warns when it is called more than ten times
        judge = pipeline("text-classification", model=model, tokenizer=tokenizer, device=model.device, batch_size=64,
                         top_k=None, function_to_apply="softmax", truncation=True, max_length=longest)
        # sorted by length, so that the texts of a batch need little padding
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            found = judge([texts[i] for i in order])
        rewards = [0.0] * len(texts)
        for i, labelled in zip(order, found):
            (rewards[i],) = [x["score"] for x in labelled if x["label"] == wanted]
        return rewards

    # what is wrong with it is found before hours of sampling
    try:
        score(["good", "good " * 600])
    except Exception as error:
        sys.exit(f"error: the reward model {name} cannot score texts: {type(error).__name__}: {error}")
    return score


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


def build_pairs(model, tokenizer, prefixes, score, *, folder, name, reward, completions, min_score_gap,
                max_new_tokens, seed):
    """The path of the preference pairs, folder/name-pairs-HASH.jsonl: prompt, chosen, rejected and their scores.

    score: the function that load_reward returns for the name or directory reward. The model draws `completions` samples
    for each prefix; every two of them make a pair, of which the higher score is chosen; pairs whose scores are at most
    min_score_gap apart are dropped. HASH is of everything that makes the file, so that it is reused.
    """
    weights = hashlib.sha256()
    for p in model.parameters():
        weights.update(p.detach().cpu().contiguous().numpy())
    # a few scores stand for the weights of a reward model
    scores = [round(x, 2) for x in score(prefixes[:8])]
    made_of = [prefixes, reward, scores, completions, min_score_gap, max_new_tokens, seed, weights.hexdigest()]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    path = os.path.join(folder, f"{name}-pairs-{digest[:12]}.jsonl")
    if os.path.exists(path):
        print(f"pairs: reusing {path}")
        return path

    # each prefix with its completions and their rewards
    print(f"pairs: sampling {completions} completions for each of {len(prefixes)} prefixes", flush=True)
    samples = complete(model, tokenizer, prefixes, max_new_tokens, completions, seed)
    scores = score([prefixes[i] + text for i, _, _, text in samples])
    scored = [[] for _ in prefixes]
    for (i, _, _, text), value in zip(samples, scores):
        if text.strip():
            scored[i].append((value, text))

    # every two of them
    rows, tried = [], 0
    for prefix, candidates in zip(prefixes, scored):
        for a, b in itertools.combinations(candidates, 2):
            tried += 1
            (low, rejected), (high, chosen) = sorted((a, b))
            if high - low > min_score_gap:
                rows.append(dict(prompt=prefix, chosen=chosen, rejected=rejected, chosen_score=high,
                                 rejected_score=low))
    print(f"pairs: {len(rows)} of {tried} kept, score gap over {min_score_gap}; "
          f"mean reward of the samples {np.mean(scores):+.3f}")
    if not rows:
        sys.exit("error: every pair was dropped: no two rewards differ by more than --min_score_gap; lower it")

    # under a name of its own first, as two runs may be at it
    write_lines(f"{path}.{os.getpid()}", rows)
    os.replace(f"{path}.{os.getpid()}", path)
    return path


# -----------------------------------------------------------------------------
# scores of a policy


SCORES = ("reward", "sample_rkl", "sample_kl", "entropy")


def score_policy(model, ref, tokenizer, prefixes, score, max_new_tokens, seed=0):
    """One sample for each test prefix: ({reward, sample_kl, sample_rkl, entropy, their standard errors (name_se), n},
    the samples, a dict each)."""
    # one completion a prefix, so the samples are independent
    samples = complete(model, tokenizer, prefixes, max_new_tokens, 1, seed)
    prompts = [prompt for _, prompt, _, _ in samples]
    responses = [response for _, _, response, _ in samples]
    stats = response_stats(measure(model, ref, prompts, responses))
    rewards = score([prefixes[i] + text for i, _, _, text in samples])

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


def show_answers(models, tokenizer, prompts, max_new_tokens, seed, score=None):
    """Print each prompt (a list of token ids) and an answer of each model, {name: model}, with its reward in front if
    there is a score, a function texts -> list of rewards."""
    # the same seed for all, so that their answers begin alike
    drawn = {}
    for name, model in models.items():
        drawn[name] = generate(model, tokenizer, prompts, max_new_tokens, seed=seed)
    for i, prompt in enumerate(prompts):
        text = tokenizer.decode(prompt, skip_special_tokens=True)
        # of a long prompt only the end, which is what the answers continue
        shown = text.strip()
        if len(shown) > 300:
            shown = "..." + shown[-300:]
        print("\n" + printable(shown))
        for name in models:
            answer = response_text(tokenizer, prompt, drawn[name][i][0])
            reward = ""
            if score is not None:
                reward = f" {score([text + answer])[0]:+.2f}"
            print(f"  {name:9}{reward} |{printable(answer)}")


def read_log(folder, step=float("inf")):
    """The lines of a run's log up to a step, parsed; none after a line that was cut."""
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


# (title, what lies across and its name in the log, {name in the log: style of its line})
PANELS = [
    ("reward", "KL(π ‖ π_ref) of samples, nats", "eval_sample_rkl", {"eval_reward": "o-"}),
    ("KL(π_ref ‖ π) of rejected and chosen (dotted)", "step", "step", {"kl_l": "-", "kl_w": ":"}),
    ("loss; held out: dots", "step", "step", {"loss": "-", "eval_loss": "o"}),
    ("accuracy; held out: dots", "step", "step", {"acc": "-", "eval_acc": "o"}),
]


def draw(logs, path):
    """A figure of logs, {label: records of a log.jsonl}, with the panels for which they hold something: rewards against
    KLs (Figure 3a of the paper; bars are 1.96 standard errors), KLs (Figures 1, 3b, 3c), loss, accuracy. It takes
    matplotlib."""
    # drawn to a file, so it needs no window
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    logged = {name for log in logs.values() for record in log for name in record}
    panels = [panel for panel in PANELS if not logged.isdisjoint(panel[3])]
    width = 4.5 * len(panels) + 1.5
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 4), squeeze=False, layout="constrained")
    colors = plt.get_cmap("tab10" if len(logs) <= 10 else "tab20").colors

    for axis, (title, across, x, lines) in zip(axes[0], panels):
        axis.set(title=title, xlabel=across)
        for number, log in enumerate(logs.values()):
            for name, style in lines.items():
                points = [record for record in log if x in record and name in record]
                errors = [1.96 * record.get(name + "_se", 0) for record in points]
                # a model that was evaluated once is a single large dot
                size = 4 if len(points) > 1 else 9
                axis.errorbar([record[x] for record in points], [record[name] for record in points], errors, fmt=style,
                              color=colors[number % len(colors)], markersize=size, linewidth=1, elinewidth=0.5)
        # KLs start at 0, and those of some methods are ten times those of others
        if "eval_reward" in lines and axis.get_xlim()[1] > 10:
            axis.set_xscale("symlog", linthresh=1)
        if "kl_l" in lines and axis.get_ylim()[1] > 10:
            axis.set_yscale("symlog", linthresh=1)
        axis.autoscale()
    handles = [plt.Line2D([], [], color=colors[n % len(colors)]) for n in range(len(logs))]
    figure.legend(handles, list(logs), loc="outside right center", fontsize=8)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


# -----------------------------------------------------------------------------
# the script: a table and a figure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--runs", required=True, help="directories of train.py, commas between; * and ? match")
    parser.add_argument("--score", default="", help="models (directories or hub ids, commas between) to score anew, on "
                        "the prefixes of the first run, with its reward and against its reference")
    parser.add_argument("--reward", default="", help="reward of --score, if it is not that of the first run")
    parser.add_argument("--device", default=DEVICES[0], choices=DEVICES, help="device of --score (%(default)s)")
    parser.add_argument("--out", default="out/frontier.png", help="file of the figure (out/frontier.png)")
    args = parse(parser)
    writable(parser, args.out)

    # the runs' logs and last evaluations; a pattern is several directories
    logs, last = {}, {}
    for part in args.runs.split(","):
        for folder in sorted(glob.glob(os.path.join(part, ""))) or [part]:
            folder = os.path.normpath(folder)
            logs[folder] = read_log(folder)
            evals = [record for record in logs[folder] if "eval_loss" in record]
            if not evals:
                parser.error(f"{folder} holds no run of train.py that has been evaluated")
            last[folder] = evals[-1]

    # checkpoints scored anew, also those that were trained elsewhere: what can be wrong with them is found first
    scored = [path for path in args.score.split(",") if path]
    if scored:
        first = list(logs)[0]
        with open(os.path.join(first, "options.json"), encoding="utf-8") as f:
            run = json.load(f)
        if run["data"] not in TASKS or run["method"] == "sft":
            parser.error(f"--score takes prefixes, reward and reference from the first of --runs, but {first} has none")
        reference = reference_of(first)
        if not reference:
            parser.error(f"--score: the reference of {first} is missing")
        policies = {path: load_model(path, args.device) for path in scored}
        score = load_reward(args.reward or run["reward"], args.device)
        texts = load_texts(run["data"], run["texts"])
    for path in scored:
        model, tokenizer = policies[path]
        ref = load_reference(reference, tokenizer, model.device)
        model.positions = min(positions_of(model), positions_of(ref))
        prefixes = task_prefixes(texts, tokenizer, run["seed"], 0, run["eval_prefixes"])["test"]
        scores, _ = score_policy(model, ref, tokenizer, prefixes, score, run["max_new_tokens"])
        last[path + " (scored)"] = {"eval_" + name: value for name, value in scores.items()}
        logs[path + " (scored)"] = [last[path + " (scored)"]]
        prompts = [encode_prompt(tokenizer, prefix) for prefix in prefixes[:3]]
        show_answers({"reference": ref, "policy": model}, tokenizer, prompts, run["max_new_tokens"], 0, score)

    # a line for each, then the figure
    columns = (*SCORES, "loss", "acc")
    print("\n| run | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for label, record in last.items():
        cells = [label]
        for name in columns:
            cell = "–"
            if "eval_" + name in record:
                cell = f"{record['eval_' + name]:.3f}"
            if f"eval_{name}_se" in record:
                cell += f" ± {record[f'eval_{name}_se']:.3f}"
            cells.append(cell)
        print("| " + " | ".join(cells) + " |")
    print("\nlast evaluations ± standard errors over their samples; KLs are sums over a response, in nats")
    try:
        draw(logs, args.out)
        print(f"wrote {args.out}")
    except ImportError:
        print("matplotlib is not installed, so no figure was drawn")
