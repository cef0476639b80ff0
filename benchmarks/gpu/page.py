"""docs/benchmarks/gpu.md from what `make gpu` found. Runs without a GPU.

    python benchmarks/gpu/page.py [.gpu/gpu.json] [--out docs/benchmarks/gpu.md]

Parts that have not run are said to be missing. What a rehearsal found makes no page, and without a
file the page says what will be there.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.plan import PARTS

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "gpu.md"
TRIALS = Path(__file__).with_name("trials.md")
Found = Mapping[str, Any]

LINEAR_TARGET = {"int8": 1.6, "int4": 2.4, "fp8": 1.6}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", default=Path(".gpu/gpu.json"))
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    try:
        has_run = args.file.is_file()
        text = page(json.loads(args.file.read_text(encoding="utf-8"))) if has_run else unrun()
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{args.file}: {error!r}; make gpu writes such a file")
    args.out.write_text(text, encoding="utf-8")
    print(args.out)


def page(results: Found) -> str:
    """Raises ValueError for a rehearsal."""
    about = results["about"]
    if "memory_bytes" not in about:
        raise ValueError(f"{about.get('name', 'unknown')}: its figures mean nothing")
    lines = ["# The GPU backend, measured", "", *_head(about), ""]
    for part in PARTS:
        outcome = results["parts"].get(part.name)
        body = _body(part.name, outcome)
        lines += [f"## {part.title}", "", *body, ""]
    return "\n".join([*lines, TRIALS.read_text(encoding="utf-8")])


def unrun() -> str:
    """What is said before there is a file."""
    asked = [f"- {part.title[0].lower()}{part.title[1:]}" for part in PARTS]
    return "\n".join(
        [
            "# The GPU backend, measured",
            "",
            "`make gpu` has not run on a GPU yet. What it will say here:",
            "",
            *asked,
            "",
            TRIALS.read_text(encoding="utf-8"),
        ]
    )


def _head(about: Found) -> list[str]:
    return [
        f"Written by `make gpu` on {about['date']}: one {about['name']} "
        f"({about['memory_bytes'] / 2**30:.0f} GiB, {about['multiprocessors']} multiprocessors), "
        f"driver {about['driver']}, CUDA {about['cuda']}, PyTorch {about['torch']}, Triton "
        f"{about['triton']}, commit {about['commit'] or 'unknown'}.",
        "Medians; what is compared was measured in turns in one process. Weights are random, in "
        "the shape of Llama-3-8B unless it says otherwise.",
    ]


def _body(name: str, outcome: Found | None) -> list[str]:
    if outcome is None:
        return ["Not run."]
    if outcome["state"] == "failed":
        return ["Failed:", "", "```text", *outcome["error"].splitlines()[-8:], "```"]
    return TABLES[name](outcome["found"])


def _smoke(found: Found) -> list[str]:
    return [f"A product is {found['relative_error']:.1e} away from its twin in plain torch."]


def _roofs(found: Found) -> list[str]:
    peaks = found["peaks"].items()
    return [
        f"Reading {found['read_bandwidth'] / 1e12:.2f} TB/s, copying "
        f"{found['copy_bandwidth'] / 1e12:.2f} TB/s; products of 8,192³ (fp32: 4,096³): "
        + ", ".join(f"{name} {peak / 1e12:.0f}" for name, peak in peaks)
        + " TFLOP/s."
    ]


def _decode(found: Found) -> list[str]:
    rows = []
    for one in found["steps"]:
        (batch, context), ours_s, torch_s = one["at"], one["ours_s"], one["torch_s"]
        rows.append(
            (
                f"{batch}, {context:,}",
                f"{ours_s * 1e3:.2f} ms",
                f"{batch / ours_s:,.0f}",
                _percent(one["of_read"]),
                "" if torch_s is None else f"{torch_s * 1e3:.2f} ms",
                "" if torch_s is None else f"{torch_s / ours_s:.2f}x",
            )
        )
    header = ("B, context", "a step", "tokens/s", "of reading", "plain torch in a graph", "faster")
    graphs = found["graphs"]
    recorded = [("seconds to record", graphs["seconds"], 5.0)]
    return [
        _table(header, rows),
        "",
        *_targets(_decode_targets(found)),
        f"- {graphs['count']} graphs are recorded at start, once kernels are compiled",
        *_targets(recorded, most=True),
    ]


def _decode_targets(found: Found) -> list[tuple[str, float, float]]:
    """What is asked for: the worst fraction of reading, and how much faster than plain torch."""
    steps = found["steps"]
    if found["model"] != "llama-3-8b":
        return [("of reading", min(one["of_read"] for one in steps), 0.60)]
    targets = [("of reading, the worst", min(one["of_read"] for one in steps), 0.90)]
    for one in steps:
        if one["torch_s"] is not None:
            batch, faster = one["at"][0], one["torch_s"] / one["ours_s"]
            least = 1.15 if batch == 1 else 1.05
            targets.append((f"faster than plain torch, B = {batch}", faster, least))
    return targets


def _bits(found: Found) -> list[str]:
    axes = ", ".join(found["axes"])
    library = ", ".join(f"{name} {_yes(same)}" for name, same in found["library"].items())
    lines = [f"Equal, bit for bit, in {found['dtype']}: {axes}."]
    return [*lines, f"The library's product has our bits for: {library}."] if library else lines


def _prefill(found: Found) -> list[str]:
    rows = [
        (
            f"{one['tokens']:,}",
            f"{one['seconds'] * 1e3:.1f} ms",
            f"{one['tokens'] / one['seconds']:,.0f}",
            f"{one['flops'] / one['seconds'] / 1e12:.0f}",
            _percent(one["of_product"]),
        )
        for one in found["prompts"]
    ]
    header = ("tokens", "time", "tokens/s", "TFLOP/s", "of the 8,192³ product")
    attention = found["attention"]
    shares = min(one["of_product"] for one in found["prompts"])
    return [
        _table(header, rows),
        "",
        f"Attention alone, {attention['tokens']:,} tokens: {attention['ours_s'] * 1e3:.2f} ms a "
        f"layer; torch's own, unpaged: {attention['torch_s'] * 1e3:.2f} ms.",
        "",
        *_targets(
            [
                ("of the product, the worst", shares, 0.70),
                ("of torch's attention", attention["torch_s"] / attention["ours_s"], 0.65),
            ]
        ),
    ]


def _quantized(found: Found) -> list[str]:
    base = next(one["seconds"] for one in found["weights"] if one["format"] == "bfloat16")
    rows = [
        (
            one["format"],
            f"{one['seconds'] * 1e3:.2f} ms",
            f"{base / one['seconds']:.2f}x",
            _percent(one["of_read"]),
        )
        for one in found["weights"]
    ]
    targets = [
        (f"{one['format']} beside bf16", base / one["seconds"], LINEAR_TARGET[one["format"]])
        for one in found["weights"]
        if one["format"] in LINEAR_TARGET
    ]
    header = ("weights", "a step, B = 1 at 1,024", "of bf16's speed", "of reading")
    return [_table(header, rows), "", *_targets(targets)]


def _greedy(found: Found) -> list[str]:
    rows = [(name, f"{one['compared']} of {one['tokens']}") for name, one in found["types"].items()]
    return [
        "Tiny random models in fp32. Compared are tokens up to the first whose two best logits are "
        "nearer than rounding; all are equal.",
        "",
        _table(("model type", "tokens compared"), rows),
    ]


def _tests(found: Found) -> list[str]:
    counts = ", ".join(f"{number} {word}" for word, number in found["counts"].items())
    return [counts + ("" if found["whole"] else "; its time ended before all had run") + "."]


def _load(found: Found) -> list[str]:
    rate = found["file_bytes"] / found["started_s"] / 1e9
    return [
        f"{found['file_bytes'] / 1e9:.1f} GB in the page cache; an engine after "
        f"{found['started_s']:.1f} s ({rate:.1f} GB/s), and "
        f"the first token {found['first_answer_s'] * 1e3:.0f} ms after that.",
        "",
        *_targets([("seconds to an engine", found["started_s"], 10.0)], most=True),
    ]


def _generate(found: Found) -> list[str]:
    rows = [
        (
            str(one["batch"]),
            f"{one['tokens_per_s']:,.0f}",
            f"{one['mean_tokens_per_s']:,.0f}",
            "" if one["of_graph"] is None else _percent(one["of_graph"]),
        )
        for one in found["batches"]
    ]
    header = ("B", "tokens/s by the median gap", "by all gaps", "of the bare graph")
    known = [one["of_graph"] for one in found["batches"] if one["of_graph"] is not None]
    targets = [("of the bare graph, the worst", min(known), 0.95)] if known else []
    words = f"`LLM.generate`, prompts of {found['prompt']} and answers of {found['answer']} tokens."
    return [words, "", _table(header, rows), "", *_targets(targets)]


def _server(found: Found) -> list[str]:
    return [
        f"{found['streams']} streams, of which each that ends makes room for a new prompt; "
        f"`--target-itl` {found['target_itl_ms']:.1f} ms. Gaps between tokens: median "
        f"{found['median_itl_ms']:.1f}, p99 {found['p99_itl_ms']:.1f}, the longest "
        f"{found['worst_itl_ms']:.1f} ms; a decode step takes {found['step_ms']:.1f} ms. "
        f"{found['output_throughput']:,.0f} tokens/s, {found['completed']} requests.",
        "",
        *_targets([("decode steps in the longest gap", found["worst_of_step"], 2.0)], most=True),
    ]


def _transformers(found: Found) -> list[str]:
    rows = [
        (str(one["batch"]), f"{one['step_s'] * 1e3:.1f} ms", f"{one['batch'] / one['step_s']:,.0f}")
        for one in found["batches"]
    ]
    words = f"transformers {found['version']}, `generate`, greedy, as it comes:"
    return [words, "", _table(("B", "a step", "tokens/s"), rows)]


def _calibrate(found: Found) -> list[str]:
    rows = [
        (
            one["step"],
            f"{one['measured_s'] * 1e3:.2f} ms",
            f"{one['predicted_s'] * 1e3:.2f} ms",
            f"{one['predicted_s'] / one['measured_s'] - 1:+.0%}",
        )
        for one in found["steps"]
    ]
    words = "`duetto calibrate` on this device, and what its prices say of steps of the 8B shape:"
    return [words, "", _table(("step", "measured", "predicted", "off by"), rows)]


def _sanitizer(found: Found) -> list[str]:
    if not found["tools"]:
        return [f"Not run: {found['lacks']} is not there."]
    return [
        f"- {tool}: {'; '.join(one['summary'])} "
        f"({', '.join(f'{number} {word}' for word, number in one['counts'].items())})"
        for tool, one in found["tools"].items()
    ]


def _tuning(found: Found) -> list[str]:
    rows = [
        (
            one["kernel"],
            one["shape"],
            str(one["rows"]),
            f"{one['now_s'] * 1e6:.1f} µs",
            f"{one['best_s'] * 1e6:.1f} µs",
            str(one["best"]),
        )
        for one in found["best"]
    ]
    words = f"{found['tried']} tiles tried in {found['seconds']:.0f} s; the best by shape:"
    odd = [f"- other bits, so left out: {each}" for each in found["other_bits"]]
    return [
        words,
        "",
        *odd,
        "",
        _table(("kernel", "shape", "rows", "tile of today", "best", "tile"), rows),
    ]


TABLES: Mapping[str, Callable[[Found], list[str]]] = {
    "smoke": _smoke,
    "roofs": _roofs,
    "decode": _decode,
    "bits": _bits,
    "prefill": _prefill,
    "quantized": _quantized,
    "greedy": _greedy,
    "small": _decode,
    "tests": _tests,
    "load": _load,
    "generate": _generate,
    "server": _server,
    "transformers": _transformers,
    "calibrate": _calibrate,
    "sanitizer": _sanitizer,
    "tuning": _tuning,
}


def _targets(targets: Sequence[tuple[str, float, float]], *, most: bool = False) -> list[str]:
    """One line for each, and whether it is met."""
    sign = "<=" if most else ">="
    return [
        f"- {name}: {value:.2f}, asked for {sign} {limit:g}: "
        + ("met" if (value <= limit if most else value >= limit) else "**missed**")
        for name, value, limit in targets
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def _percent(part: float) -> str:
    return f"{part:.0%}"


def _yes(same: bool) -> str:
    return "yes" if same else "no"


if __name__ == "__main__":
    main()
