"""The page and the picture of reuse.py, from what its parts found. Measures nothing."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from in_process import markdown_table
from reuse_longer_page import longer_section, score_text

Found = Mapping[str, Any]  # by part; for ttft by "ttft, model, quantization"

HEAD = """# Reuse of documents' KV, measured

Written by `benchmarks/reuse.py`; do not edit. What each part found is in `reuse.json` beside this
page. What the choices are is in [the design](../design/reuse.md): `none` reuses all, `first(k)`
computes the first k tokens of each document, `hkvd(r)` the share r whose keys and values deviate
most at layer 1 (CacheBlend), `query(r)` the share r that the question attends to most (ProphetKV).
The prompt's first document is an exact prefix in all of them, and no part of any share.
"""

AGAIN = """## Again

```sh
python benchmarks/reuse.py
python benchmarks/reuse.py --parts ttft --quantization none
```
"""
KINDS = {
    "one_hop": "one hop",
    "two_hop": "two hops",
    "comparison": "comparison (two hops)",
    "not_stated": "not stated",
}


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


def _ttft(result: Found) -> str:
    header = ["", "tokens computed", "TTFT, s", "of full prefill", "lowest", "of the prefix cache"]
    header += ["ceiling", "reached"]
    rows = [
        [
            row["name"],
            f"{row['num_tokens']:.0f}",
            f"{row['ttft_s']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['lowest']:.2f}x",
            f"{row['of_prefix_cache']:.2f}x",
            f"{row['ceiling']:.2f}x" if "ceiling" in row else "",
            f"{row['fraction']:.0%}" if "fraction" in row else "",
        ]
        for row in result["rows"]
    ]
    num_rounds = len(result["rows"][0]["ttfts_s"])
    weights = result["dtype"] if result["quantization"] == "none" else result["quantization"]
    return f"""## Time to first token: {result["model"]}, {weights} weights

{result["parameters"]:,} parameters, random; KV in {result["kv_dtype"]}, {result["backend"]}
backend. {result["num_documents"]} documents of {result["document_len"]} tokens are computed one by
one, each as a prompt of its own; then a prompt has them in another order, and a question of
{result["question_len"]} tokens behind them. Medians of {num_rounds} rounds, each with another
order and question. The full prefill of a round goes on between the steps of the others, so that a
slow moment of the machine meets it too; speeds are ratios within a round. `tokens computed` counts
those that a look goes over too (of `hkvd`: in two layers). The ceiling is
1 / ((1 + r (L - 1)) / L) with {result["num_layers"]} layers: all tokens in one layer, a share r of
them in the others, and nothing else takes time.

{markdown_table(header, rows)}"""


def _quality(result: Found) -> str:
    kinds = [kind for kind in KINDS if kind in result["rows"][0]["scores"]]
    header = ["", "computed", *[KINDS[kind] for kind in kinds]]
    rows = [
        [
            row["name"],
            "" if row["curve"] is None and row["name"] != "none" else f"{row['share']:.0%}",
            *[score_text(row["scores"][kind]) for kind in kinds],
        ]
        for row in result["rows"]
    ]
    return f"""## Answers of the demo reader

{result["num_questions"]} questions about held-out worlds of six documents, of
{result["mean_document_len"]:.0f} tokens on average; shares of exact answers, and 95 % intervals
(Wilson). `computed` is the share of the documents' tokens, but for the first document's, that is
computed in its place. `documents(n)` does not mark the n documents that share the most words with
the question.

{markdown_table(header, rows)}"""


def _restart(result: Found) -> str:
    header = ["", "TTFT, s", "of no disk", "of prompts found", "ready after, s"]
    plain = result["rows"][0]["ttft_s"]
    rows = [
        [
            row["name"],
            f"{row['ttft_s']:.2f}",
            f"{plain / row['ttft_s']:.2f}x",
            f"{row['hit_rate']:.0%}",
            f"{row['load_s']:.1f}",
        ]
        for row in result["rows"]
    ]
    return f"""## After a restart: {result["model"]}, {result["quantization"]} weights

{result["num_prompts"]} prompts, one after the other, each a document of {result["document_len"]}
tokens and a question of {result["question_len"]}; each start is a process of its own. The second
start finds what the first one left on the disk: {result["disk_bytes"] / 2**20:.1f} MiB. Medians.

{markdown_table(header, rows)}"""


SECTIONS = (
    ("ttft", _ttft),
    ("quality", _quality),
    ("longer", longer_section),
    ("restart", _restart),
)


def _picture(found: Found, file: Path) -> str | None:
    """Curves of quality by the share computed; None where there is nothing to draw, or to draw
    with."""
    if "quality" not in found:
        return None
    try:
        pictures = import_module("reuse_picture")
    except ImportError:
        return None
    ttfts = {key: value for key, value in found.items() if key.startswith("ttft,")}
    pictures.draw(found["quality"], ttfts, KINDS, file)
    return f"![Exact answers by the share computed, and time to first token]({file.name})\n"
