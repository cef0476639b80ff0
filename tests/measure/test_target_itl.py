"""benchmarks/target_itl.py runs, small, and says what it is asked to."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "target_itl.py"


def test_target_itl(tiny_model: Path, tmp_path: Path) -> None:
    page = tmp_path / "target.md"
    words = "--prompt-len 600 --seconds 2 --factors 4 --fixed 512 --num-streams 4"
    command = [sys.executable, str(SCRIPT), "--models", str(tiny_model), "--backend", "reference"]
    command += [*words.split(), "--output", str(page)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    (measured,) = found["models"]
    targets = [row for row in measured["rows"] if row["target_s"] is not None]
    assert {row["name"].split()[-1] for row in targets} == {"cold", "learned"}
    assert any(row["name"].startswith("off") for row in measured["rows"])
    learned = next(row for row in targets if row["name"].endswith("4 steps, learned"))
    # The prompt was cut into several steps, and took no less than alone.
    assert learned["steps"] > 3 and learned["ttft"] > 0.5 * measured["alone_ttft_s"]
    assert found["worst_p99_over_target"] > 0.3
    assert page.read_text().count(", learned |") == 3
