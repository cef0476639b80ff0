"""The planner beside what others published of other devices and engines; nothing is fitted here.

    python benchmarks/planner_published.py [--out docs/benchmarks/planner-published.md]

Each row is a step that somebody's page tells alone: a first token or a next token. Predictions are
with graphs, since all of these engines keep the host out of the way; and without.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

from duetto.core.shape import BatchShape, RequestShape
from duetto.models.find import find_program
from duetto.pricing.cost_model import CostModel, Deployment
from duetto.pricing.find_hardware import find_hardware
from duetto.pricing.hardware import HardwareSpec
from duetto.program.shape import Precision

TRT = "TensorRT-LLM 0.5: its docs/source/performance.md, low latency"
LMDEPLOY = "LMDeploy 0.1.0a1: its docs/en/benchmark/a100_fp16.md, static inference"
LAMBDA = "vLLM 0.6.0 by Lambda: LambdaLabsML/vllm-benchmark, results/prompt_10, last request"
NIM = "NVIDIA NIM 1.8: docs.nvidia.com/nim/benchmarking/llm/1.0.0/performance"
VLLM_L4 = "vLLM 0.23: ai.wmx.dev/benchmarks, median ITL"
VLLM_A100_40G = "vLLM 0.23: johnmusgrave.com/p/vllm-throughput-latency-sweep-on"


@dataclass(frozen=True, slots=True)
class Published:
    source: str
    device: str
    model: str
    tp: int
    bits: Literal[8, 16]
    what: Literal["first", "next"]  # token
    batch: int
    context: int  # tokens of each prompt, or of each request in the cache
    ms: float


def _table(
    source: str, device: str, model: str, tp: int, bits: Literal[8, 16], cells: str
) -> list[Published]:
    """Rows from cells like `first 1x128=16`: what, batch x context, milliseconds."""
    found = []
    for cell in cells.split(","):
        what, _, rest = cell.strip().partition(" ")
        size, _, ms = rest.partition("=")
        batch, _, context = size.partition("x")
        kind: Literal["first", "next"] = "first" if what == "first" else "next"
        found.append(
            Published(source, device, model, tp, bits, kind, int(batch), int(context), float(ms))
        )
    return found


ROWS: Sequence[Published] = (
    *_table(TRT, "a100", "llama-2-7b", 1, 16, "first 1x128=16, first 1x2048=133"),
    *_table(TRT, "a100", "llama-2-70b", 4, 16, "first 1x128=47, first 1x2048=377"),
    *_table(TRT, "h100", "llama-2-7b", 1, 8, "first 1x128=7, first 1x2048=36"),
    *_table(TRT, "h100", "llama-2-70b", 4, 8, "first 1x128=26, first 1x2048=109"),
    *_table(TRT, "l40s", "llama-2-7b", 1, 8, "first 1x128=14, first 1x2048=73"),
    # Next tokens: the median, halfway through the answer.
    *_table(
        LMDEPLOY,
        "a100",
        "llama-2-7b",
        1,
        16,
        "first 1x128=22, first 1x2048=139, next 1x192=10, next 16x192=11, next 32x192=12, "
        "next 64x192=14, next 16x2112=20, next 32x2112=31",
    ),
    *_table(
        LMDEPLOY,
        "a100",
        "llama-2-13b",
        1,
        16,
        "first 1x128=40, first 1x2048=242, next 1x192=17, next 16x192=19, next 32x192=21, "
        "next 64x192=24, next 16x2112=33",
    ),
    *_table(
        LMDEPLOY,
        "a100",
        "llama-2-70b",
        4,
        16,
        "first 1x128=74, first 1x2048=402, next 1x192=29, next 16x192=30, next 32x192=32, "
        "next 64x192=37, next 16x2112=35, next 32x2112=40, next 64x2112=50",
    ),
    *_table(LAMBDA, "a100", "llama-3-8b", 1, 16, "next 1x600=11.4"),
    *_table(LAMBDA, "h100", "llama-3-8b", 1, 16, "next 1x600=7.05"),
    *_table(LAMBDA, "h100", "llama-3-70b", 8, 16, "next 1x600=11.2"),
    *_table(NIM, "h100", "llama-3.1-70b", 2, 8, "first 1x5000=407, next 1x5250=18.6"),
    *_table(
        VLLM_L4, "l4", "qwen2.5-0.5b", 1, 16, "next 1x320=5.1, next 8x320=5.5, next 32x320=7.1"
    ),
    *_table(VLLM_A100_40G, "a100-40g", "llama-3.1-8b", 1, 16, "next 1x1088=13.3"),
)


def hardware_of(row: Published) -> HardwareSpec:
    if row.device == "a100-40g":  # its data sheet differs from the A100-80G's in its memory
        return replace(find_hardware("a100"), name="a100-40g", memory_bandwidth=1.555e12)
    return find_hardware(row.device)


def predicted_ms(row: Published, *, graphs: bool) -> float:
    eight = row.bits == 8
    deployment = Deployment(
        tensor_parallel=row.tp,
        precision=Precision(1.0, 2.0, 1.0) if eight else Precision(),
        arithmetic="float8" if eight else "bfloat16",
        graphs=graphs,
    )
    model = CostModel(find_program(row.model), hardware_of(row), deployment)
    new, past = (row.context, 0) if row.what == "first" else (1, row.context)
    return model.step_time(BatchShape((RequestShape(new, past),) * row.batch)) * 1e3


def rows_table(rows: Sequence[Published]) -> str:
    lines = [
        "| device | model | TP | bits | token | batch | tokens | published | predicted | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms = predicted_ms(row, graphs=True)
        lines.append(
            f"| {row.device} | {row.model} | {row.tp} | {row.bits} | {row.what} | {row.batch} | "
            f"{row.context} | {row.ms:g} | {ms:.3g} | {ms / row.ms:.2f} |"
        )
    return "\n".join(lines)


def summary_table(rows: Sequence[Published]) -> str:
    groups: dict[str, Callable[[Published], bool]] = {
        "first token of up to 128": lambda row: row.what == "first" and row.context <= 128,
        "first token of 2,048 and more": lambda row: row.what == "first" and row.context > 128,
        "next token, one request": lambda row: row.what == "next" and row.batch == 1,
        "next token, 8 to 64 requests": lambda row: row.what == "next" and row.batch > 1,
        "all": lambda _row: True,
    }
    lines = ["| | rows | with graphs | `--no-graphs` |", "|---|---|---|---|"]
    for name, belongs in groups.items():
        own = [row for row in rows if belongs(row)]
        cells = [
            _ratios([predicted_ms(row, graphs=g) / row.ms for row in own]) for g in (True, False)
        ]
        lines.append(f"| {name} | {len(own)} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _ratios(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


PAGE = """\
# The planner beside what others published

Made by `python benchmarks/planner_published.py --out docs/benchmarks/planner-published.md`, which
needs no GPU. Efficiencies are those that [A100 measurements of 2023](planner-a100.md) gave; no
number is fitted on these rows, though LMDeploy's bound one range of that fit. A ratio is predicted
over published: the median, and in brackets the least and the most.

{summary}

- The kernels carry over; the host does not. With `--no-graphs` a step is priced with what vLLM
  of 2023 spent on scheduling, launching and sampling, which is as long as a whole next token of
  these engines. That is what the measurements were; the default is an engine of today, with graphs.
- A first token of few tokens is predicted too fast: the host is in the published time.
- First tokens are the published latency of a whole request (NIM's over HTTP).
- An all-reduce of a few numbers takes 30 µs and 1.5 µs for each hop, as NCCL did in 2023. Engines
  of today take less, so a next token on eight devices is predicted too slow.
- Products of 8 bits reach less of their peak than those of 16, so long prompts of 8 bits are
  predicted too fast on an H100; one efficiency serves both.

## Row by row, with graphs, in milliseconds

{rows}

## Sources

{sources}

Left out: throughput at saturation, which is of a scheduler as much as of a step, and figures whose
batch or lengths are not told. None that tells them was found of an RTX 4090, an H200 or an MI300X.
"""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page to write; stdout if not given")
    args = parser.parse_args()
    sources = dict.fromkeys(row.source for row in ROWS)
    page = PAGE.format(
        summary=summary_table(ROWS),
        rows="\n\n".join(
            f"{source}\n\n{rows_table([row for row in ROWS if row.source == source])}"
            for source in sources
        ),
        sources="\n".join(f"- {source}" for source in sources),
    )
    if args.out is None:
        print(page)
    else:
        args.out.write_text(page, encoding="utf-8")
        print(f"written: {args.out}")


if __name__ == "__main__":
    main()
