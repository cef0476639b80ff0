"""What a climb took, rung by rung: kept as JSON beside its curve, printed as a table.

python -m training.record docs/benchmarks/training-reader.json
"""

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.shapes import Shape

if TYPE_CHECKING:  # it brings torch, which whoever reads a record may not have
    from training.checkpoint import Progress


def write_record(progress: "Progress", shape: Shape, seed: int, device: str, file: Path) -> None:
    """Write the climb's rungs, each with its own steps, tokens, seconds and last scores."""
    rungs: list[dict[str, Any]] = []
    num_tokens, seconds = 0, 0.0
    for name, last in {score["rung"]: score for score in progress.scores}.items():
        rungs.append(
            {
                "rung": name,
                "steps": last["step"],
                "tokens": last["num_tokens"] - num_tokens,
                "seconds": round(last["seconds"] - seconds, 1),
                "exact": last["exact"],
            }
        )
        num_tokens, seconds = last["num_tokens"], last["seconds"]
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"{device}, {platform.machine()}",
        "parameters": shape.num_parameters,
        "vocabulary": shape.vocab_size,
        "seed": seed,
        "rungs": rungs,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(record: dict[str, Any]) -> str:
    """The rungs as lines of text, and their sum."""
    rungs = record["rungs"]
    whole = {key: sum(rung[key] for rung in rungs) for key in ("steps", "tokens", "seconds")}
    lines = [
        f"{record['parameters']:,} parameters, {record['vocabulary']} tokens in the vocabulary, "
        f"seed {record['seed']}, {record['device']}, {record['date']}",
        f"{'rung':<12} {'steps':>6} {'M tokens':>9} {'minutes':>8}  held out, at its end",
    ]
    for rung in [*rungs, {"rung": "all together", "exact": {}, **whole}]:
        exact = ", ".join(f"{kind} {share:.1%}" for kind, share in rung["exact"].items())
        line = (
            f"{rung['rung']:<12} {rung['steps']:>6} {rung['tokens'] / 1e6:>9.2f} "
            f"{rung['seconds'] / 60:>8.1f}  {exact}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="training.record", description=__doc__)
    parser.add_argument("record", type=Path)
    print(table(json.loads(parser.parse_args().record.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
