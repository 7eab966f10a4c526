"""Recompute KLs and entropy of a few of a run's last samples, one token at a time, in float64.

    python -m extras.check out/reviews/1-dpo-beta=0.1 out/imdb/1-dpo-beta=0.1

It shares no code with the project.
"""
import argparse
import json
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def log_probabilities(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


parser = argparse.ArgumentParser(prog="python -m extras.check", description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("runs", nargs="+", help="directories of runs of a sentiment task")
worst = {"kl": 0.0, "rkl": 0.0, "entropy": 0.0}
for folder in parser.parse_args().runs:
    options = json.load(open(os.path.join(folder, "options.json")))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy, reference = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
                         for path in (folder, options["ref_from"] or options["init_from"])]
    # the samples of these weights
    step = torch.load(os.path.join(folder, "state.pt"), weights_only=True)["step"]
    lines = open(os.path.join(folder, "evals", f"{step}.jsonl"), encoding="utf-8").read().splitlines()
    for line in lines[:: max(1, len(lines) // 5)][:5]:
        row = json.loads(line)
        ids = tokenizer(row["prompt"])["input_ids"]
        found = {"kl": 0.0, "rkl": 0.0, "entropy": 0.0}
        for token in row["tokens"]:
            p, q = log_probabilities(policy, ids), log_probabilities(reference, ids)
            found["kl"] += float((q.exp() * (q - p)).sum())
            found["rkl"] += float((p.exp() * (p - q)).sum())
            found["entropy"] -= float((p.exp() * p).sum()) / len(row["tokens"])
            ids = ids + [token]
        for name, x in found.items():
            worst[name] = max(worst[name], abs(x - row[name]) / max(1, abs(x)))
        # the text that the reward has seen is that of these tokens
        assert row["response"] in tokenizer.decode(ids, skip_special_tokens=True), row
        print(folder, {name: (round(x, 4), row[name]) for name, x in found.items()})
print("largest differences (relative, if the value is above 1):", {name: f"{x:.1e}" for name, x in worst.items()})
