"""Compare methods at equal KL over several seeds, from the logs and samples of their runs.

    python -m extras.compare --runs='out/reviews/[1-8]-*/' --at_kl 0.3 1 --against dpo 'dpo β=1'
    python -m extras.compare --runs=assets/reviews.json.gz --only dpo 'tdpo2 α=0.5' --out=out/two
    python -m extras.compare tables             # writes the result tables of README.md and assets/RESULTS.md again

Runs that differ only in their seed share a line. The reward at a KL is read where a run's evaluations, joined by
straight lines, first cross that KL(policy || reference). A difference is taken between runs of the same seed, on the
same prefixes. OUT.json keeps everything that the tables and the figure need, so it can be given to --runs later.
"""
import argparse
import functools
import glob
import gzip
import hashlib
import json
import math
import os
import re
import sys

import numpy as np

from eval_imdb import SCORES, draw, read_log
from sample import create, parse, writable

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# -----------------------------------------------------------------------------
# results of runs, and which runs differ only in their seed

# options that may differ among runs that share a line
OWN = ("seed", "out_dir", "resume", "overwrite", "device", "compile", "micro_tokens", "checkpoint_activations",
       "wandb_log", "log_interval", "max_steps")


def objective_of(folder):
    """The text of tdpo.py in a folder. A run's folder has a copy of the one that it was trained with."""
    with open(os.path.join(folder, "tdpo.py"), encoding="utf-8") as f:
        return f.read()


def short_hash(*values):
    """A short hash of values that json takes."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def from_log(folder, run):
    """The result of a run with these options: its last scores; all evaluations (evals); the KLs of its training pairs
    (curves); and three hashes. Runs with the same `setting` differ only in their seed, those with the same `origin`
    share a reference, and those with the same `pair` drew the same first samples for the same prefixes."""
    log = read_log(folder)
    evals, pair = [], None
    for record in log:
        if "eval_reward" not in record:
            continue
        values = {"step": record["step"], "n": record["eval_n"]}
        for name in SCORES:
            values[name] = round(record["eval_" + name], 5)
            values[name + "_se"] = round(record[f"eval_{name}_se"], 5)
        with open(os.path.join(folder, "evals", f"{record['step']}.jsonl"), encoding="utf-8") as f:
            samples = [json.loads(line) for line in f]
        # the values of each sample, so that two runs can be compared prefix by prefix
        values["rewards"] = [round(sample["reward"], 3) for sample in samples]
        values["rkls"] = [round(sample["rkl"], 2) for sample in samples]
        # runs that drew the same samples before training began with the same model, length and random numbers
        if not evals:
            drawn = [[sample["prompt"], sample["tokens"]] for sample in samples]
            pair = short_hash(drawn, os.path.basename(run["reward"]))
        evals.append(values)
    if len(evals) < 2:
        sys.exit(f"error: {folder} has logged no evaluation after its first")

    # a point of a curve is the mean of ten steps
    steps = [record for record in log if "kl_w" in record]
    curves = []
    for begin in range(0, len(steps), 10):
        block = steps[begin:begin + 10]
        point = {"step": block[-1]["step"]}
        for name in ("kl_w", "kl_l"):
            mean = np.mean([record[name] for record in block])
            point[name] = round(float(mean), 4)
        curves.append(point)

    # runs know their files by absolute paths; of a file below this folder only the relative path counts
    shared = {name: value for name, value in run.items() if name not in OWN}
    for name in ("data", "init_from", "ref_from", "reward", "texts"):
        shared[name] = run[name].removeprefix(os.getcwd() + os.sep)
    # each seed may have a model of its own: reviews-sft-1, 1-sft
    for name in ("init_from", "ref_from"):
        shared[name] = re.sub(rf"-{run['seed']}$|(?<![^/]){run['seed']}-(?=[^/]*$)", "", shared[name])
    last = {name: value for name, value in evals[-1].items() if name not in ("rewards", "rkls")}
    return {
        "run": folder, "seed": run["seed"], **last, "pair": pair,
        "setting": short_hash(shared, last["step"], objective_of(folder)),
        "origin": short_hash(*[shared[name] for name in ("data", "init_from", "reward", "texts")]),
        "evals": evals, "curves": curves,
    }


def names_of(folder, run):
    """Names for the line of a run: its method's, its directory's without a seed in front, and its whole path."""
    name = run["method"]
    if run["method"] == "tdpo2":
        name += f" α={run['alpha']:g}"
    if run["beta"] != 0.1:
        name += f" β={run['beta']:g}"
    names = [name, re.sub(r"^\d+-", "", os.path.basename(folder)), folder]
    # an edited objective does not have the name of the paper's
    if objective_of(folder) != objective_of(PROJECT):
        names.pop(0)
    return names


def first_free(names, result, others):
    """The first of the names that no other result has, except for other seeds of the same setting."""
    for name in names:
        same = [other for other in others if other["label"] == name]
        if all(x.get("setting") == result.get("setting") and x["seed"] != result["seed"] for x in same):
            break
    return name


def by_label(results):
    """{label: its results}, in order."""
    groups = {}
    for result in results:
        groups.setdefault(result["label"], []).append(result)
    return groups


def references(results):
    """Results of the references, one for each seed: the scores of the runs' first evaluations, if the policy was still
    the reference then. Runs of different tasks or models have none, because one name would stand for several."""
    found = {}
    if len({r.get("origin") for r in results}) > 1:
        return []
    for r in results:
        if r["evals"] and abs(r["evals"][0]["sample_rkl"]) <= 1e-4:
            first = {"label": "reference", "seed": r["seed"], "evals": []}
            found.setdefault(r["seed"], {**r["evals"][0], **first})
    return list(found.values())


@functools.lru_cache
def read_json(path):
    """What a .json or .json.gz file holds."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as f:
        return json.load(f)


# -----------------------------------------------------------------------------
# rewards at equal KL

# Student's t, the 97.5 % quantile for 2 to 16 values
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def student(values):
    """Half of Student's 95 % interval of the mean of values (two or more)."""
    n = len(values)
    return T975[min(n - 2, len(T975) - 1)] * np.std(values, ddof=1) / n**0.5


def interval(values, errors):
    """(mean, half of a 95 % interval) over seeds: Student's, or the interval over samples, from the standard errors,
    if that is wider, because two seeds can agree by chance."""
    half = 1.96 * np.linalg.norm(errors) / len(values)
    if len(values) > 1:
        half = max(half, student(values))
    return np.mean(values), half


def reward_at(kls, rewards, level):
    """Rewards (R,) at which R curves, kls and rewards (R, evaluations), joined by straight lines, first cross
    KL(policy || ref) = level; NaN for a curve that does not."""
    found = np.full(len(kls), np.nan)
    # backwards, so that the first crossing is written last
    for k in range(kls.shape[1] - 2, -1, -1):
        a, b = kls[:, k], kls[:, k + 1]
        crosses = (np.minimum(a, b) <= level) & (level <= np.maximum(a, b)) & (a != b)
        share = (level - a[crosses]) / (b - a)[crosses]
        found[crosses] = rewards[crosses, k] + share * (rewards[:, k + 1] - rewards[:, k])[crosses]
    return found


# draws of the bootstrap
DRAWS = 2000


@functools.lru_cache
def drawn_prefixes(n):
    """How often each of n prefixes is in a draw of n of them (DRAWS + 1, n); the first draw has each of them once."""
    rng = np.random.default_rng(n)
    return np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), DRAWS)])


def drawn_curves(run):
    """(kls, rewards), each (DRAWS + 1, evaluations): the means over a run's prefixes, and over draws of them."""
    counts = drawn_prefixes(run["n"])
    kls = counts @ np.array([e["rkls"] for e in run["evals"]]).T / run["n"]
    rewards = counts @ np.array([e["rewards"] for e in run["evals"]]).T / run["n"]
    return kls, rewards


def compare(runs, others, levels):
    """What `compare_at` finds at each of the levels for these runs, or for their differences from the runs in others,
    {pair: run}, that began alike."""
    curves = []
    for run in runs:
        pair = [run]
        if others is not None:
            pair.append(others[run["pair"]])
        if all(r["evals"] and all("rewards" in e for e in r["evals"]) for r in pair):
            curves.append([drawn_curves(r) for r in pair])
    return [compare_at(level, curves, len(runs)) for level in levels]


def compare_at(level, curves, count):
    """((mean, low, high, t) or None, reached): the mean over runs of the reward at KL(policy || ref) = level, from the
    curves of each run, or from those of each pair of runs, whose rewards are subtracted. It is None unless all `count`
    runs reach the level; reached is how many do. low and high: the 95 % interval of a bootstrap that draws seeds and,
    for each, prefixes, the same for both runs. t: half of Student's interval over the seeds, the wider one if seeds
    differ, NaN for one seed."""
    found = []
    for pair in curves:
        rewards = [reward_at(*one, level) for one in pair]
        difference = rewards[0]
        if len(pair) == 2:
            difference = rewards[0] - rewards[1]
        # a run that reaches the level by a hair does so only in some of the draws
        if np.isfinite(difference[0]) and np.isfinite(difference).mean() >= 0.95:
            found.append(difference)

    # the runs that reach the level first are those that move fast, so the mean of only some runs would mislead
    n = len(found)
    if n < count:
        return None, n
    # seeds, and for each a draw of its prefixes, independent of the others
    found = np.stack(found)
    rng = np.random.default_rng(0)
    seeds = rng.integers(n, size=(DRAWS, n))
    drawn = found[seeds, rng.integers(1, DRAWS + 1, size=seeds.shape)]
    drawn = drawn[np.isfinite(drawn).any(axis=1)]
    low, high = np.percentile(np.nanmean(drawn, axis=1), (2.5, 97.5))
    t = math.nan
    if n > 1:
        t = student(found[:, 0])
    return (found[:, 0].mean(), low, high, t), n


def compared(runs, others, levels):
    """A cell for each level with what `compare` finds, or with how many of the runs reach the level."""
    cells = []
    for found, reached in compare(runs, others, levels):
        cell = "–"
        if found is not None:
            mean, low, high, t = found
            cell = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            if reached > 1:
                cell += f" ± {t:.3f}"
        elif reached:
            cell = f"– ({reached} of {len(runs)})"
        cells.append(cell)
    return cells


# -----------------------------------------------------------------------------
# tables, as lines of Markdown, and the figure


def markdown(head, rows):
    """The lines of a table of cells."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def table(results, levels):
    """Means and 95 % intervals of the last evaluations, and rewards at equal KL, a line for each label."""
    head = ["method", "reward", "KL(π ‖ π_ref)", "KL(π_ref ‖ π)", "entropy"]
    head += [f"reward at KL {level:g}" for level in levels] + ["seeds × samples"]
    rows = []
    for label, runs in by_label(references(results) + results).items():
        cells = [label]
        for name in SCORES:
            mean, half = interval([r[name] for r in runs], [r[name + "_se"] for r in runs])
            cells.append(f"{mean:.3f} ± {half:.3f}")
        cells += compared(runs, None, levels)
        cells.append(f"{len(runs)} × {runs[0]['n']}")
        rows.append(cells)
    return markdown(head, rows)


def differences(results, levels, bases):
    """Rewards at equal KL, minus those of runs of the same seed and prefixes: a line for each label in bases, which is
    {label: the label of the runs that are subtracted}."""
    groups, rows = by_label(results), []
    for label, base in bases.items():
        runs = groups[label]
        others = {run["pair"]: run for run in groups[base] if run.get("pair")}
        paired = sum(run.get("pair") in others for run in runs)
        cells = [f"– ({paired} of {len(runs)} began alike)"] * len(levels)
        if paired == len(runs):
            cells = compared(runs, others, levels)
        rows.append([label, base, *cells])
    return markdown(["method", "less"] + [f"at KL {level:g}" for level in levels], rows)


def differences_from(results, levels, base):
    """The same table with one label subtracted from all others."""
    bases = {r["label"]: base for r in results if r["label"] != base}
    return differences(results, levels, bases)


def ends(results, levels, labels):
    """For each of the labels the KL and the reward at which its runs end, and rewards at equal KL, by that KL."""
    groups, rows = by_label(results), []
    for label in labels:
        runs = groups[label]
        kl, wide = interval([r["sample_rkl"] for r in runs], [r["sample_rkl_se"] for r in runs])
        reward, half = interval([r["reward"] for r in runs], [r["reward_se"] for r in runs])
        cells = [label, f"{kl:.1f} ± {wide:.1f}", f"{reward:.2f} ± {half:.2f}"]
        for found, _ in compare(runs, None, levels):
            cells.append("–" if found is None else f"{found[0]:.2f}")
        rows.append((kl, cells))
    rows.sort(reverse=True)
    head = ["method", "ends at KL", "with reward", f"reward at KL {levels[0]:g}"]
    return markdown(head + [f"{level:g}" for level in levels[1:]], [cells for _, cells in rows])


def mean_logs(results):
    """{label: records as in a log, of means over seeds}, which eval_imdb.py draws."""
    logs = {}
    for label, runs in by_label(results).items():
        logs[label] = []
        for evals in zip(*[r["evals"] for r in runs]):
            mean, half = interval([e["reward"] for e in evals], [e["reward_se"] for e in evals])
            kl = np.mean([e["sample_rkl"] for e in evals])
            logs[label].append({"step": evals[0]["step"], "eval_sample_rkl": kl, "eval_reward": mean,
                                "eval_reward_se": half / 1.96})
        for block in zip(*[r["curves"] for r in runs]):
            means = {name: np.mean([point[name] for point in block]) for name in ("kl_w", "kl_l")}
            logs[label].append({"step": block[0]["step"], **means})
    return logs


# -----------------------------------------------------------------------------
# the tables that stand in README.md and assets/RESULTS.md, each between <!-- table NAME --> and <!-- end -->

REVIEWS = [0.3, 0.75, 1, 2]
IMDB = [0.25, 0.5, 1]
# the runs of README.md's first picture, and the methods that an edited objective is compared with
SHOWN = ["dpo", "tdpo1", "dpo β=0.3", "tdpo2 α=0.5", "dpo β=1"]
EDITS = {"ipo": "dpo", "lndpo": "dpo", "tdpo2r": "tdpo2 α=0.5"}

# {name: (function, its data in assets/, its further arguments)}
TABLES = {
    "reviews": (table, "reviews.json.gz", REVIEWS),
    "reviews, ends": (ends, "reviews.json.gz", [0.3, 1], SHOWN),
    "reviews, edits": (differences, "reviews.json.gz", REVIEWS, EDITS),
    "reviews-half": (table, "reviews-half.json.gz", REVIEWS),
    "imdb": (table, "imdb.json.gz", IMDB),
    "imdb-second": (table, "imdb-second.json.gz", IMDB),
    "imdb-two-seeds": (table, "imdb-two-seeds.json", []),
}
for base in ("dpo", "dpo β=0.3", "dpo β=1", "dpo β=3"):
    TABLES[f"reviews, less {base}"] = (differences_from, "reviews.json.gz", REVIEWS, base)
for base in ("dpo", "dpo β=0.3", "dpo β=1"):
    TABLES[f"imdb, less {base}"] = (differences_from, "imdb.json.gz", IMDB, base)
    TABLES[f"imdb-second, less {base}"] = (differences_from, "imdb-second.json.gz", IMDB, base)


def result_tables():
    """{name: lines} of all TABLES."""
    tables = {}
    for name, (function, data, *arguments) in TABLES.items():
        tables[name] = function(read_json(os.path.join(PROJECT, "assets", data)), *arguments)
    return tables


def with_tables(text, tables):
    """The text with each of the tables, {name: lines}, between its two markers, if the text has them."""
    for name, lines in tables.items():
        before, marker, rest = text.partition(f"<!-- table {name} -->\n")
        if marker:
            text = before + marker + "\n".join(lines) + "\n" + rest[rest.index("<!-- end -->"):]
    return text


def write_tables(name, tables):
    """Write tables between their markers in a file of the project."""
    path = os.path.join(PROJECT, name)
    with open(path, encoding="utf-8") as f:
        text = f.read()
    with open(path, "w", encoding="utf-8") as f:
        f.write(with_tables(text, tables))


# -----------------------------------------------------------------------------
# the script

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, prog="python -m extras.compare")
    parser.add_argument("what", nargs="?", choices=("tables",), help="write the tables of the project's results again")
    parser.add_argument("--runs", default="", help="directories of train.py, or .json (.gz) files that this script "
                        "wrote, commas between; * and ? match")
    parser.add_argument("--only", nargs="*", default=[], help="use only the runs with these names, such as dpo (all)")
    parser.add_argument("--at_kl", type=float, nargs="*", default=[1, 2], help="KLs to compare rewards at (1 2)")
    parser.add_argument("--against", nargs="*", default=[], help="names of runs, such as dpo: adds a table of the "
                        "differences from each at these KLs, paired by seed and prefix")
    parser.add_argument("--out", default="out/compared", help="writes OUT.json and OUT.png (out/compared)")
    args = parse(parser)

    if args.what == "tables":
        tables = result_tables()
        for name in ("README.md", "assets/RESULTS.md"):
            write_tables(name, tables)
        sys.exit()
    if not args.runs:
        parser.error("--runs names directories of train.py, or .json files that this script wrote")
    writable(parser, args.out + ".json")

    # a pattern is several sources; those that this script wrote come first, so that their labels stay
    sources = []
    for part in args.runs.split(","):
        sources += sorted(glob.glob(part)) or [part]
    sources = dict.fromkeys(map(os.path.normpath, sources))
    results = []
    for source in sorted(sources, key=lambda x: not x.endswith((".json", ".json.gz"))):
        try:
            if source.endswith((".json", ".json.gz")):
                for result in read_json(source):
                    names = [result["label"], f"{result['label']} of {source}"]
                    results.append({**result, "label": first_free(names, result, results)})
            else:
                run = read_json(os.path.join(source, "options.json"))
                result = from_log(source, run)
                results.append({**result, "label": first_free(names_of(source, run), result, results)})
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
            parser.error(f"{source} holds no run of a sentiment task, and nothing that this script wrote: {error}")

    # the runs that are wanted
    labels = by_label(results)
    for name in args.only + args.against:
        if name not in labels:
            parser.error(f"there is no run called {name}: the runs are called {', '.join(labels)}")
    if args.only:
        results = [result for result in results if result["label"] in args.only + args.against]

    # the numbers, tables of them, a figure
    with create(args.out + ".json") as f:
        lines = [json.dumps(result, ensure_ascii=False) for result in results]
        f.write("[" + ",\n".join(lines) + "]\n")
    print("\n" + "\n".join(table(results, args.at_kl)))
    print("\n± is half of a 95 % interval: over seeds or, if that is wider, over samples; after brackets, Student's t "
          "over seeds. Brackets hold a 95 % bootstrap interval over seeds and prefixes. KLs and entropies are in nats")
    for against in args.against:
        print("\n" + "\n".join(differences_from(results, args.at_kl, against)))
    print(f"\nwrote {args.out}.json")
    try:
        draw(mean_logs(results), args.out + ".png")
        print(f"wrote {args.out}.png")
    except ImportError:
        print("matplotlib is not installed, so no figure was drawn")
