"""Duetto and its peers on one checkpoint and one machine, in turns; writes docs/benchmarks/cpu.md.

    python benchmarks/peers/compare.py --work DIR --model DIR [--rounds 3] [--systems duetto,llama]

`--work` is where environments, builds and converted models are kept (25 GB); the model is one that
`duetto make-model llama-3.2-1b` wrote. Nothing else should run meanwhile. What neighbours leave of
a machine changes within an hour: with `--add-to FILE`, rounds of several runs make one page.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from peers import install, systems
from peers.report import write_page
from peers.roofs import roofs
from peers.workload import CELLS

PRECISIONS = ("bf16", "int8", "int4")


def main() -> None:
    args = _arguments()
    chosen = _prepare(args)
    cells = args.cells.split(",") if args.cells else list(CELLS)
    # Neighbours change what memory gives, minute by minute, so the machine is probed in each round.
    rates, probes = _earlier(args.add_to, [system.label for system in chosen])
    for number in range(args.rounds):
        for system in chosen:
            print(f"round {number + 1}: {system.label}", flush=True)
            try:
                found = system.measure(cells)
            except RuntimeError as error:
                print(f"  {error}", flush=True)
                continue
            if system.name == "Duetto":
                probes.append(_machine())
            for cell, rate in found.items():
                rates[system.label].setdefault(cell, []).append(rate)
            print(
                "  " + ", ".join(f"{cell} {rate:.1f}" for cell, rate in found.items()), flush=True
            )
    probes = probes or [_machine()]
    if args.add_to:
        args.add_to.write_text(json.dumps({"all": rates, "probes": probes}), encoding="utf-8")
    machine = _median(probes)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "model": args.model.name,
        "threads": args.threads,
        "limits": {
            "GB/s read": machine["read_bandwidth"] / 1e9,
            "GFLOPS in fp32": machine["peaks"]["f32"] / 1e9,
            "GOPS in int8": machine["peaks"]["int8"] / 1e9,
        },
        "roofs": roofs(args.model, machine),
        "medians": {
            label: {cell: statistics.median(values) for cell, values in by_cell.items()}
            for label, by_cell in rates.items()
            if by_cell
        },
        "all": rates,
    }
    if args.out:
        write_page(args.out, result)
    print(json.dumps(result))


def _earlier(
    file: Path | None, labels: Sequence[str]
) -> tuple[dict[str, dict[str, list[float]]], list[dict[str, Any]]]:
    """Rates by system and cell, in the page's order, and probes of the machine, so far."""
    found = {"all": {}, "probes": []}
    if file is not None and file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
    return found["all"] | {label: {} for label in labels if label not in found["all"]}, found[
        "probes"
    ]


def _prepare(args: argparse.Namespace) -> list[systems.System | systems.LlamaCpp]:
    """Install what is asked for; the systems in the order in which they take turns."""
    wanted, work, repeats, threads = args.systems.split(","), args.work, args.repeats, args.threads
    work.mkdir(parents=True, exist_ok=True)
    by_precision: dict[str, list[systems.System | systems.LlamaCpp]] = {p: [] for p in PRECISIONS}
    if "duetto" in wanted:
        for precision, group in by_precision.items():
            group.append(systems.duetto(args.model, precision, repeats, threads))
    if "llama" in wanted:
        programs = install.install_llama_cpp(work)
        python = install.install_openvino(work)
        files = install.convert_llama_cpp(work, args.model, programs, python)
        for precision, file in files.items():
            program = programs / "llama-batched-bench"
            by_precision[precision].append(
                systems.LlamaCpp(precision, program, file, threads, repeats)
            )
    if "openvino" in wanted:
        python = install.install_openvino(work)
        for precision, directory in install.convert_openvino(work, args.model, python).items():
            for group in (0,) if precision == "bf16" else (0, 128):
                system = systems.openvino(python, directory, precision, repeats, threads, group)
                by_precision[precision].append(system)
    if "vllm" in wanted:
        python = install.install_vllm(work)
        by_precision["bf16"].append(systems.vllm(python, args.model, repeats, threads))
    chosen = args.precisions.split(",")
    return [system for precision in chosen for system in by_precision[precision]]


def _machine() -> dict[str, Any]:
    """What the machine gives, probed now: bytes/s read, operations/s by precision."""
    probe = ["bench", "kernels", "tiny", "--kernel", "rows", "--rows", "1", "--json"]
    command = [sys.executable, "-m", "duetto", *probe]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    machine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["machine"]
    return machine


def _median(probes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "read_bandwidth": statistics.median(p["read_bandwidth"] for p in probes),
        "peaks": {
            precision: statistics.median(p["peaks"][precision] for p in probes)
            for precision in probes[0]["peaks"]
        },
    }


def _arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--systems", default="duetto,llama,openvino,vllm")
    parser.add_argument("--cells", help=f"some of: {', '.join(CELLS)}")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--add-to", type=Path, help="keep rounds here, and count those kept")
    parser.add_argument("--repeats", type=int, default=1, help="of each cell in a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/cpu.md"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
