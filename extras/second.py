"""A second opinion on the IMDb reward: score the samples that the first classifier has scored by logistic regression on
TF-IDF of words and pairs of words, fitted to beginnings of IMDb's training reviews.

    python -m extras.compare --runs='out/imdb/[1-3]-*dpo*/' --out=out/imdb/first
    python -m extras.second imdb.parquet out/imdb/first.json out/imdb/second.json
    python -m extras.compare --runs=out/imdb/second.json --at_kl 0.25 0.5 1 --against dpo

imdb.parquet has text, label (1 is positive) and split. second.json is first.json with the second classifier's rewards.
The samples are read from the runs that first.json names.
"""
import argparse
import collections
import json
import os
import re

import numpy as np
import torch
from datasets import load_dataset

from extras.compare import read_json

WORDS = 22              # in a stretch of a review, which is the mean length of a prefix with its completion


def terms(text):
    words = re.findall(r"[a-z']+", text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:])]


def matrix(texts):
    """TF-IDF of texts (n, terms), each row of length 1."""
    rows, columns, values = [], [], []
    for n, text in enumerate(texts):
        counts = collections.Counter(term for term in terms(text) if term in index)
        weights = {term: (1 + np.log(count)) * idf[term] for term, count in counts.items()}
        norm = np.sqrt(sum(x * x for x in weights.values())) or 1.0
        for term, x in weights.items():
            rows.append(n)
            columns.append(index[term])
            values.append(x / norm)
    shape = len(texts), len(index)
    return torch.sparse_coo_tensor([rows, columns], values, shape, dtype=torch.float32).to_sparse_csr()


parser = argparse.ArgumentParser(prog="python -m extras.second", description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("reviews", "results", "out"):
    parser.add_argument(name)
args = parser.parse_args()
table = load_dataset("parquet", data_files=args.reviews, split="train").to_dict()
reviews = {"train": [], "test": []}
for text, label, split in zip(table["text"], table["label"], table["split"]):
    if split not in reviews:            # IMDb's unlabelled ones
        continue
    text = re.sub(r"<br\s*/?>", " ", text).split()
    # two stretches of a training review, one of a test review
    for begin in (0, WORDS) if split == "train" else (0,):
        stretch = " ".join(text[begin:begin + WORDS])
        if stretch:
            reviews[split].append((stretch, float(label)))

seen = collections.Counter(term for text, _ in reviews["train"] for term in set(terms(text)))
index = {term: n for n, term in enumerate(sorted(term for term, count in seen.items() if count >= 5))}
idf = {term: np.log(len(reviews["train"]) / seen[term]) for term in index}
data = {}
for split, rows in reviews.items():
    data[split] = matrix([text for text, _ in rows]), torch.tensor([y for _, y in rows])

# logistic regression with a penalty on the weights
weight, bias = torch.zeros(len(index), 1, requires_grad=True), torch.zeros(1, requires_grad=True)
optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")
x, y = data["train"]


def closure():
    optimizer.zero_grad()
    logits = (x @ weight)[:, 0] + bias
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y) + 1e-5 * weight.square().sum()
    loss.backward()
    return loss


optimizer.step(closure)


def positive(features):
    with torch.no_grad():
        return torch.sigmoid((features @ weight)[:, 0] + bias)


x, y = data["test"]
accuracy = ((positive(x) > 0.5) == (y > 0.5)).float().mean()
print(f"{len(index)} terms; accuracy {accuracy:.4f} on the first {WORDS} words of {len(y)} test reviews")

# the samples of every evaluation
results = read_json(args.results)
agreement = []
for run in results:
    for e in run["evals"]:
        path = os.path.join(run["run"], "evals", f"{e['step']}.jsonl")
        samples = [json.loads(line) for line in open(path, encoding="utf-8")]
        scores = positive(matrix([s["prompt"] + s["response"] for s in samples])).tolist()
        agreement.append(np.corrcoef(scores, e["rewards"])[0, 1])
        e["rewards"] = [round(score, 3) for score in scores]
        e["reward"] = float(np.mean(scores))
        e["reward_se"] = float(np.std(scores, ddof=1) / len(scores)**0.5)
    run["reward"], run["reward_se"] = run["evals"][-1]["reward"], run["evals"][-1]["reward_se"]
print(f"correlation with the first classifier's, sample by sample: {np.mean(agreement):.3f}")
with open(args.out, "w", encoding="utf-8") as f:
    f.write("[" + ",\n".join(json.dumps(run, ensure_ascii=False) for run in results) + "]\n")
