"""All that a GPU is needed for, in under 8 minutes: `make gpu`.

    python benchmarks/gpu/run.py [--out .gpu] [--only decode prefill] [--seconds 470] [--again]

Each part's figures are in OUT/gpu.json as soon as it has ended; what it printed is in OUT/gpu.log.
Parts that are done are left out, so a run that was killed goes on where it was; those that failed
come last. A part that raises, dies or takes longer than its limit has failed, and the next goes on.
The last line of stdout is one JSON document. `page.py` then makes docs/benchmarks/gpu.md of it.
`--rehearse` runs every part on a CPU in Triton's interpreter, on tiny shapes, to test the parts.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from time import monotonic
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.plan import NAMES, PARTS, Part
from gpu.results import LOG, Outcome, Results

WORKER = Path(__file__).with_name("worker.py")
SOURCES = Path(__file__).parents[2] / "src"
START_S = 300.0  # for torch to load and the device to be found
LEAST_S = 10.0  # with less left, no part begins
LAST_LINES = 12


class WorkerEnded(Exception):
    """It died, or took too long; with the reason."""


class Worker:
    """The process that runs parts. `about` is the device that it found."""

    def __init__(self, log: Path, *, rehearse: bool, script: Path = WORKER) -> None:
        """Raises WorkerEnded if it does not start: without a GPU, say."""
        command = [sys.executable, "-u", str(script), *["--rehearse"] * rehearse]
        paths = [str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        if rehearse:
            environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self._log = log
        with log.open("a", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,  # so that what it started ends with it
            )
        self._answers: Queue[str] = Queue()
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.about: Mapping[str, Any] = self._answer(START_S)["about"]

    def ask(self, part: str, found: Mapping[str, Any], limit_s: float) -> Mapping[str, Any]:
        """{"found": ...} or {"error": ...}. Raises WorkerEnded, having ended it, if none comes."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, if so: no answer comes
            folder = str(self._log.parent.absolute())
            asked = {"part": part, "found": found, "limit_s": limit_s, "folder": folder}
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        return self._answer(limit_s)

    def end(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self, limit_s: float) -> Mapping[str, Any]:
        try:
            line = self._answers.get(timeout=limit_s)
        except Empty:
            self.end()
            raise WorkerEnded(f"took longer than {limit_s:g} s") from None
        if not line:
            self._process.wait()
            self.end()
            raise WorkerEnded(f"ended with {self._process.returncode}:\n{self._last_lines()}")
        answer: Mapping[str, Any] = json.loads(line)
        return answer

    def _last_lines(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LAST_LINES:])


class Runner:
    """Runs parts until all are done or the time is over."""

    def __init__(
        self,
        results: Results,
        seconds: float,
        start: Callable[[], Worker],
        patience: float = 1.0,
    ) -> None:
        """A part may take `patience` times its limit."""
        self._results, self._patience = results, patience
        self._end = monotonic() + seconds
        self._start = start
        self._worker: Worker | None = None

    def run(self, parts: Sequence[Part] = PARTS, *, again: bool = False) -> None:
        """Raises WorkerEnded if there is no device."""
        try:
            self._started()
            for part in parts if again else open_parts(self._results, parts):
                left = self._end - monotonic()
                if left < LEAST_S:
                    print(f"{part.name}: not begun, the time is over", flush=True)
                    continue
                outcome = self._outcome(part, min(self._patience * part.limit_s, left))
                self._results.set(part.name, outcome)
                told = f"\n{outcome.error}" if outcome.error else ""
                print(f"{part.name}: {outcome.state}, {outcome.seconds:.1f} s{told}", flush=True)
        finally:
            if self._worker is not None:
                self._worker.end()

    def _started(self) -> Worker:
        if self._worker is None:
            self._worker = self._start()
            self._results.begin_on(self._worker.about)
        return self._worker

    def _outcome(self, part: Part, limit_s: float) -> Outcome:
        start = monotonic()
        try:
            answer = self._started().ask(part.name, self._results.found(), limit_s)
        except WorkerEnded as error:
            self._worker = None  # whatever it left on the device is gone with it
            return Outcome("failed", monotonic() - start, error=str(error))
        took_s = monotonic() - start
        if "error" in answer:
            return Outcome("failed", took_s, error=answer["error"])
        return Outcome("done", took_s, answer["found"])


def open_parts(results: Results, parts: Sequence[Part]) -> list[Part]:
    """Those that are not done; what failed before comes behind what was never tried."""
    left = [part for part in parts if not results.is_done(part.name)]
    return sorted(left, key=lambda part: part.name in results.outcomes)


def main() -> None:
    args = _arguments()
    results = Results(args.out)

    def start() -> Worker:
        return Worker(results.folder / LOG, rehearse=args.rehearse)

    parts = [part for part in PARTS if not args.only or part.name in args.only]
    patience = 20.0 if args.rehearse else 1.0  # an interpreter's time says nothing
    try:
        Runner(results, patience * args.seconds, start, patience).run(parts, again=args.again)
    except WorkerEnded as error:
        sys.exit(str(error).splitlines()[-1])
    states = {name: results.outcomes[name].state for name in NAMES if name in results.outcomes}
    summary = {"file": str(results.file), "device": results.about["name"], "parts": states}
    print(json.dumps(summary))
    sys.exit(0 if len(states) == len(NAMES) and set(states.values()) == {"done"} else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".gpu"))
    parser.add_argument("--only", nargs="+", choices=NAMES, default=[], metavar="PART")
    parser.add_argument("--seconds", type=float, default=470.0)
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny")
    return parser.parse_args()


if __name__ == "__main__":
    main()
