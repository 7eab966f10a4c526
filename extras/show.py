"""Show which tokens carry the divergence: responses of a checkpoint, each token shaded by its share.

    python -m extras.show --model=out/reviews-tdpo2                         # in the terminal, by the share of the KL
    python -m extras.show --model=out/reviews-tdpo2 --html=kl.html          # and as a page
    python -m extras.show --model=DIR --show=surprisal --prompt="This film was"

A token's share is its part of the response's sum of absolute values. Red tokens are above 0 and blue ones below.
"""
import argparse
import html
from collections import namedtuple

import numpy as np

from sample import (create, encode_prompt, generate, measure, printable, response_text, sampling_options, set_up,
                    writable)

# a token is one shade darker for each of these shares that its own share reaches
SHADES = (0.02, 0.05, 0.1, 0.2, 0.4)
PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 17px/1.6 sans-serif; max-width: 60em; margin: 1em auto; padding: 0 1em }}
p {{ white-space: pre-wrap; margin: 0.4em 0 }}</style>
<h2>{title}</h2>
{body}
"""

# a piece of text, and the color behind it: (red, green, blue), or None
Span = namedtuple("Span", "text color", defaults=(None,))


def color_of(share):
    """(red, green, blue) of a share between -1 and 1: white if it is small, and the darker the larger it is."""
    strong = (225, 70, 40) if share > 0 else (50, 110, 235)
    depth = sum(abs(share) >= shade for shade in SHADES) / len(SHADES)
    return tuple(round(255 + depth * (x - 255)) for x in strong)


def token_texts(tokenizer, prompt, response):
    """The text that each token adds to those before it. If a character takes several tokens, the last one has it."""
    texts = []
    done = tokenizer.decode(prompt)
    for n in range(1, len(response) + 1):
        text = tokenizer.decode(prompt + response[:n])
        if text.endswith("\ufffd") and n < len(response):
            texts.append("")
            continue
        # some tokens have no text at all
        texts.append(text[len(done):] or "∅")
        done = text
    return texts


def shaded(texts, values, name):
    """Spans of a response's tokens, colored by their shares of sum(|values|), and one with the sum of values (nats)."""
    whole = max(np.abs(values).sum(), 1e-9)
    spans = []
    nats = 0.0
    for text, value in zip(texts, values):
        # tokens without text count with the character that they begin
        nats += value
        if text:
            spans.append(Span(text, color_of(nats / whole)))
            nats = 0.0
    return spans + [Span(f" [{name} {values.sum():.2f} nats]")]


def on_terminal(span):
    """A span as text for a terminal."""
    # nothing that a model writes moves the terminal's cursor
    if span.color is None:
        return printable(span.text)
    red, green, blue = span.color
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in span.text)
    return f"\033[30;48;2;{red};{green};{blue}m{text}\033[0m"


def on_page(span):
    """A span as HTML."""
    text = html.escape(span.text)
    if span.color is None:
        return text
    red, green, blue = span.color
    return f'<span style="background: rgb({red},{green},{blue})">{text}</span>'


def written(spans, write):
    """Spans as one text; write is on_terminal or on_page."""
    return "".join(write(span) for span in spans)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m extras.show", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", default="kl", choices=("kl", "logratio", "surprisal"),
                        help="shade by KL(ref || model), log pi - log ref or -log pi (%(default)s)")
    parser.add_argument("--html", default="", help="page to write or replace")
    args = sampling_options(parser)
    compares = args.show != "surprisal"
    if compares and not args.ref:
        parser.error(f"--show={args.show} compares with a reference, and {args.model} has none: give --ref")
    if args.html:
        writable(parser, args.html, "--html")
    model, tokenizer, ref, texts = set_up(args)

    prompts = [encode_prompt(tokenizer, text) for text in texts]
    # of each prompt its responses: [(name of the model, spans)]
    shown = [[] for _ in texts]
    models = {"policy": (model, ref)}
    if ref is not None:
        models = {"reference": (ref, None), **models}
    for name, (m, against) in models.items():
        drawn = generate(m, tokenizer, prompts, args.max_new_tokens, 1, args.temperature, args.top_p, args.seed)
        responses = [response for (response,) in drawn]
        measured = measure(m, against, prompts, responses)
        for prompt, response, values, entry in zip(prompts, responses, measured, shown):
            # the reference does not diverge from itself
            if compares and against is None:
                spans = [Span(response_text(tokenizer, prompt, response))]
            else:
                spans = shaded(token_texts(tokenizer, prompt, response), values[args.show], args.show)
            entry.append((name, spans))
    scale = [Span(f" {shade:.0%} ", color_of(shade)) for shade in SHADES]
    words = f"a token's share of its response's {args.show} (absolute values; blue is below 0), from "
    legend = [Span(words), *scale, Span(" on")]

    # the terminal
    for text, entry in zip(texts, shown):
        print("\n" + printable(text.strip()))
        for name, spans in entry:
            print(f"  {name:9} |" + written(spans, on_terminal))
    print("\n" + written(legend, on_terminal))

    # the page
    if args.html:
        body = [written(legend, on_page)]
        for text, entry in zip(texts, shown):
            body.append(f"<h3>{html.escape(text.strip())}</h3>")
            for name, spans in entry:
                body.append(f"<p><i>{name}</i> {written(spans, on_page)}</p>")
        with create(args.html) as f:
            f.write(PAGE.format(title=html.escape(f"{args.model}: {args.show}"), body="\n".join(body)))
        print(f"wrote {args.html}")
