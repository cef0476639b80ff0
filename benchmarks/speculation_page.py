"""The page and the picture of speculation.py, from what its parts found. Measures nothing."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from in_process import markdown_table

Found = Mapping[str, Any]  # by part; for parts about a shape by "part, model, quantization"

HEAD = """# Speculation, measured

Written by `benchmarks/speculation.py`; do not edit. What each part found is in
`speculation.json` beside this page.

A run with drafts and one without go on in one process, over one model in memory, with the same
requests, step by step in turn and each for half of the time: so a slow moment of the machine meets
both. A run whose answers differ in any bit stops the benchmark. Ratios are medians over such pairs;
the first pair, in which neither the price of a step nor acceptance is known, is told apart. Speed
is tokens per second while all requests of both runs decode. The policy that decides how many drafts
are verified is the one that ships, unless it is said otherwise. Weights of the shapes are random:
what they say does not matter here, what a step takes does.
"""

AGAIN = """## Again

```sh
python benchmarks/speculation.py
python benchmarks/speculation.py --parts speed --quantization none
```
"""


def write_page(found: Found, output: Path) -> None:
    sections = [HEAD]
    if picture := _picture(found, output.with_suffix(".svg")):
        sections.append(picture)
    for part, section in SECTIONS:
        for key in [k for k in found if k == part or k.startswith(f"{part},")]:
            result = found[key]
            text = section(result)
            sections.append(f"{text}\n\n{result['date']}; {result['machine']}.\n")
    sections.append(AGAIN)
    output.write_text("\n".join(sections), encoding="utf-8")


def _about(result: Found) -> str:
    size = f"{result['parameters']:,} parameters"
    return f"{result['model']}, {size}, {_weights(result)} weights, {result['backend']} backend"


def _weights(result: Found) -> str:
    return str(result["dtype"] if result["quantization"] == "none" else result["quantization"])


def _equality(result: Found) -> str:
    header = ["proposer", "weights / KV", "temperature", "not greedy", "answers"]
    header += ["proposed", "accepted", "differ"]
    rows = [
        [
            row["method"],
            row["formats"],
            f"{row['temperature']:g}",
            f"{row['num_not_greedy']}",
            f"{row['num_answers']}",
            f"{row['num_proposed']}",
            f"{row['num_accepted']}",
            f"{row['num_differing']}",
        ]
        for row in result["rows"]
    ]
    return f"""## The same bits

A random model (the shape `tiny`) answers each request alone without drafts, then in batches of 1,
2, 4, 8 and 16 with four drafts in every step, whether they pay or not. Tokens and log-probabilities
are compared, bit for bit. Above temperature 0, top-p is 0.95; `not greedy` is how many of the
answers temperature changed. `recorded` proposes the true token with probability 0.8; `draft_model`
is the same model in another format. {result["num_answers"]} answers were compared;
{result["differing"]} differ.

{markdown_table(header, rows)}

Every other axis (chunked prompts, cache, preemption, stop strings, penalties, masks, static
batches, steps in flight, other formats) is in `tests/test_same_answer_speculated.py`."""


def _speed(result: Found) -> str:
    header = ["requests", "α", "plain, tokens/s", "with drafts", "prices allow", "at K ="]
    header += ["reached", "first pair", "tokens per drafted step", "simulated", "off by"]
    rows = [
        [
            f"{row['batch']}",
            f"{row['alpha']:g}",
            f"{row['plain_tokens_per_s']:.1f}",
            f"{row['ratio']:.2f}x",
            f"{row['allowed']:.2f}x",
            f"{row['best_num_drafts']}",
            f"{row['fraction']:.2f}",
            f"{row['first_ratio']:.2f}x",
            f"{row['tokens_per_drafted_step']:.2f}",
            f"{row['simulated']:.2f}x",
            f"{row['simulated'] / row['ratio'] - 1:+.0%}",
        ]
        for row in result["rows"]
    ]
    counts = result["num_drafts"]
    prices = [
        [f"T(B(1 + K)) ÷ T(B), B = {batch}", *(f"{t / times[0]:.2f}" for t in times)]
        for batch, times in result["step_s"].items()
    ]
    return f"""## Speed by acceptance: {_about(result)}

An instrument that knows the answers proposes the true next token with probability α, another one
else. `prices allow` is the most that a fixed number of drafts K could reach: (1 - α^(K + 1)) /
(1 - α) tokens per step (Leviathan et al., 2023), at the price of a step of 1 + K rows for each
request, which is measured in the same run with drafts that are all right:

{markdown_table(["K", *map(str, counts)], prices)}

`simulated` is what the simulator predicts from these prices and α, with the same policy.

{markdown_table(header, rows)}"""


def _loss(result: Found) -> str:
    header = ["drafts", "requests", "plain, tokens/s", "ratio", "first pair", "lowest", "pairs"]
    header += ["proposed", "accepted"]
    rows = [
        [
            row["drafts"],
            f"{row['batch']}",
            f"{row['plain_tokens_per_s']:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['first_ratio']:.3f}",
            f"{min(row['ratios'][1:]):.3f}",
            f"{len(row['ratios']) - 1}",
            f"{row['num_proposed']}",
            f"{row['num_accepted']}",
        ]
        for row in result["rows"]
    ]
    return f"""## Drafts that are of no use: {_about(result)}

`always wrong` drafts cost nothing to make and are never accepted. `a useless model` is a draft
model of random weights, a quarter as wide and as deep, which has to be asked to be found out.

{markdown_table(header, rows)}"""


def _copy(result: Found) -> str:
    return f"""## A JSON document with one field changed: {_about(result)}

The prompt ({result["num_prompt"]} tokens) holds a document and asks for a change; the answer
({result["num_output"]} tokens) is the document with it. Random weights say nothing of the kind, so
the answer is forced by raising the logit of its next token; the steps are computed as ever. `ngram`
gives {result["tokens_per_step"]:.2f} tokens per step with {result["num_drafts"]} drafts in each.
With the policy that ships, answers come {result["ratio"]:.2f}x as fast as in plain decoding (median
of {len(result["ratios"]) - 1} pairs), and steps that verify drafts give
{result["tokens_per_drafted_step"]:.2f} tokens."""


def _proposing(result: Found) -> str:
    header = ["proposer", "temperature", "tokens of an answer", "acceptance", "by place"]
    header += ["tokens per step", "speed", "shipped: tokens per step", "shipped: speed"]
    rows = [
        [
            row["method"],
            f"{row['temperature']:g}",
            f"{row['mean_answer']:.1f}",
            f"{row['acceptance']:.2f}",
            " ".join(f"{share:.2f}" for share in row["by_place"]),
            f"{row['tokens_per_step']:.2f}",
            f"{row['ratio_always']:.2f}x",
            f"{row['shipped_tokens_per_step']:.2f}",
            f"{row['ratio_shipped']:.2f}x",
        ]
        for row in result["rows"]
    ]
    return markdown_table(header, rows)


_ASKED = """one question at a time ({} questions). First four drafts in every
step, whether they pay or not, then as the shipped policy has it; speed is that of plain decoding
times so much, the median of the second half of the questions. `by place` is how often the first,
second, ... draft was accepted of those that were verified."""


def _reader(result: Found) -> str:
    return f"""## Answers from documents

The demo reader, {_ASKED.format(result["num_questions"])}

{_proposing(result)}"""


def _draft(result: Found) -> str:
    return f"""## The demo draft for the demo reader

The demo reader with `duetto-demo-draft`, {_ASKED.format(result["num_questions"])} Speed cannot
show here: the draft has half of the reader's layers, so a draft costs about half of a token.

{_proposing(result)}"""


def _coupling(result: Found) -> str:
    rows = [
        [f"{row['noise']:g}", *(f"{row[k]:.2f}" for k in ("best", "gumbel", "inverse_cdf"))]
        for row in result["rows"]
    ]
    header = ["noise on the logits", "best possible", "the sampler", "inverse CDF by token id"]
    return f"""## One noise for two distributions

How often the sampler draws the same token from two close distributions, with the same seed and
place: {result["num_pairs"]} pairs over {result["num_tokens"]:,} tokens, {result["num_draws"]} draws
each. One has normal logits times 3, the other the same with normal noise. The best that any
coupling can reach is one minus their total variation distance.

{markdown_table(header, rows)}"""


SECTIONS = (
    ("equality", _equality),
    ("speed", _speed),
    ("loss", _loss),
    ("copy", _copy),
    ("reader", _reader),
    ("draft", _draft),
    ("coupling", _coupling),
)


def _picture(found: Found, file: Path) -> str | None:
    """Curves of speed and of loss; None where there is nothing to draw, or nothing to draw with."""
    speeds = {k: v for k, v in found.items() if k.startswith("speed,")}
    losses = {k: v for k, v in found.items() if k.startswith("loss,")}
    if not speeds and not losses:
        return None
    try:
        pictures = import_module("speculation_picture")
    except ImportError:
        return None
    pictures.draw(speeds, losses, file)
    return f"![Speed by acceptance, prices of steps, and drafts of no use]({file.name})\n"
