"""Answer the questions of MT-bench or AlpacaEval with a model, in the form that their judges read.

    python -m extras.judge --model=DIR --format=mt_bench --prompts=question.jsonl --out=model_answer/NAME.jsonl
    python -m extras.judge --model=DIR --format=alpaca_eval --prompts=alpaca_eval.jsonl --out=NAME.json

FastChat and AlpacaEval know the model by the name of the file. In MT-bench the second turn follows the model's first
answer. Temperature and length are options; neither benchmark's own settings are built in.
"""
import argparse
import json
import os
import sys
import time
import uuid

from sample import (DEVICES, chat, check_sampling, create, encode_prompt, generate, load_model, parse, positions_of,
                    read_prompts, response_text, writable, write_lines)

# the columns of a question
COLUMNS = {"mt_bench": {"question_id": (int, str), "turns": list}, "alpaca_eval": {"instruction": str}}


def answer(model, tokenizer, conversations, args):
    """The model's replies to conversations, lists of the user's turns: as many lists of as many texts."""
    positions = positions_of(model)
    histories = [[] for _ in conversations]
    replies = [[] for _ in conversations]
    # the first turns of all questions, then the second ones
    for turn in range(max(map(len, conversations))):
        prompts = {}
        for n, turns in enumerate(conversations):
            if turn >= len(turns):
                continue
            histories[n].append({"role": "user", "content": turns[turn]})
            try:
                prompts[n] = encode_prompt(tokenizer, chat(tokenizer, histories[n]))
            except ValueError as error:
                sys.exit(f"error: question {n + 1} {error}")
            # a question that leaves no room for an answer does not stop the others
            if len(prompts[n]) >= positions:
                print(f"warning: question {n + 1} is too long in turn {turn + 1}: its answer is empty")
                histories[n].append({"role": "assistant", "content": ""})
                replies[n].append("")
                del prompts[n]

        drawn = generate(model, tokenizer, list(prompts.values()), args.max_new_tokens, 1, args.temperature, args.top_p,
                         args.seed + turn)
        for (n, prompt), (response,) in zip(prompts.items(), drawn):
            # a model that was trained on HH may go on with the user's next question
            text = response_text(tokenizer, prompt, response).split("\n\nHuman:")[0].strip()
            histories[n].append({"role": "assistant", "content": text})
            replies[n].append(text)
    return replies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m extras.judge", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens of an answer at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (%(default)s)")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus sampling (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same answers (%(default)s)")
    parser.add_argument("--device", default=DEVICES[0], choices=DEVICES, help="where to sample (%(default)s)")
    parser.add_argument("--prompts", required=True, help=".jsonl file of questions")
    parser.add_argument("--format", required=True, choices=tuple(COLUMNS), help="whose questions and answers these are")
    parser.add_argument("--out", required=True, help="file to write or replace, called after the model")
    args = parse(parser)
    check_sampling(parser, args)
    writable(parser, args.out)
    questions = []
    for place, row in read_prompts(args.prompts):
        columns = COLUMNS[args.format]
        right = isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in columns.items())
        if not right or not all(isinstance(turn, str) for turn in row.get("turns", [])):
            parser.error(f"{place} is not a JSON object with {' and '.join(columns)}, where turns is a list of texts, "
                         "and an instruction a text")
        questions.append(row)
    model, tokenizer = load_model(args.model, args.device)

    name = os.path.splitext(os.path.basename(args.out))[0]
    # MT-bench's questions have several turns, and its answers are lines; AlpacaEval's have one turn, and are a list
    if args.format == "mt_bench":
        replies = answer(model, tokenizer, [row["turns"] for row in questions], args)
        lines = []
        for row, texts in zip(questions, replies):
            lines.append({
                "question_id": row["question_id"], "answer_id": uuid.uuid4().hex, "model_id": name,
                "choices": [{"index": 0, "turns": texts}], "tstamp": time.time(),
            })
        write_lines(args.out, lines)
    else:
        replies = answer(model, tokenizer, [[row["instruction"]] for row in questions], args)
        answers = []
        for row, (text,) in zip(questions, replies):
            answers.append({"instruction": row["instruction"], "output": text, "generator": name})
        with create(args.out) as f:
            json.dump(answers, f, indent=1)
    print(f"wrote {len(questions)} answers to {args.out}")
