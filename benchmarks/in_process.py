"""What the benchmarks here share: an engine in this process, driven by the wall clock.

The engine is stepped directly, so that every step's StepRecord and the KV blocks are seen.
"""

import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from duetto.build import Built, build, make_engine, served_config
from duetto.core.batch import RequestUpdate, StepRecord
from duetto.core.config import SchedulerConfig
from duetto.core.engine_args import EngineArgs
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.engine.engine import Engine
from duetto.measure.records import RequestRecord, record_from_timings
from duetto.measure.workload import Workload, WorkloadRequest
from duetto.scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class KVUse:
    """KV memory after one step, in tokens, for the requests that then run."""

    num_running: int
    reserved_model: int  # if each had max_model_len reserved
    reserved_request: int  # if each had its own prompt and max_tokens reserved
    in_tables: int  # in the blocks of all block tables; a shared block counts for each
    held: int  # in blocks that anyone holds; a shared block counts once
    unused: int  # of in_tables: slots beyond the tokens that the request has


@dataclass(slots=True)
class Run:
    """Everything that one run of a workload left."""

    duration_s: float = 0.0
    records: dict[str, RequestRecord] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)  # for the same-answer check
    steps: list[StepRecord] = field(default_factory=list)
    kv: list[KVUse] = field(default_factory=list)

    def in_order(self) -> list[RequestRecord]:
        return [self.records[str(i)] for i in range(len(self.records))]


def new_engine(built: Built, args: EngineArgs) -> Engine:
    """A fresh scheduler (so an empty cache) over the model that is loaded already."""
    config = served_config(built.model, args)
    return make_engine(built.model, config, built.prices.step_time)


def run_workload(engine: Engine, workload: Workload) -> Run:
    """Run to the end. A request arrives at its time, whether or not a step is under way then."""
    run, start = Run(), time.monotonic()
    timed = sorted(enumerate(workload.requests), key=lambda each: each[1].arrival_s)
    pending = deque((request.arrival_s, _request(str(i), request, start)) for i, request in timed)
    while pending or engine.has_work:
        now_s = time.monotonic() - start
        while pending and pending[0][0] <= now_s:
            request = pending.popleft()[1]
            run.answers[request.request_id] = []
            engine.add(request)
        if not engine.has_work:
            time.sleep(pending[0][0] - now_s)
            continue
        report = engine.step()
        for update in report.updates:
            _take(run, update, workload)
        if report.record is not None:
            run.steps.append(report.record)
            run.kv.append(_kv_use(engine.scheduler))
    run.duration_s = time.monotonic() - start
    return run


def _request(request_id: str, wanted: WorkloadRequest, start: float) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=wanted.prompt_token_ids or (),
        sampling=SamplingParams(
            temperature=0.0, max_tokens=wanted.num_output_tokens, ignore_eos=True
        ),
        max_tokens=wanted.num_output_tokens,
        seed=0,
        arrival_time=start + wanted.arrival_s,
    )


def _take(run: Run, update: RequestUpdate, workload: Workload) -> None:
    run.answers[update.request_id] += [token.token_id for token in update.tokens]
    if update.finish_reason is not None and update.timings is not None:
        prompt = workload.requests[int(update.request_id)].prompt_token_ids or ()
        run.records[update.request_id] = record_from_timings(
            update.timings,
            num_prompt_tokens=len(prompt),
            num_cached_tokens=update.num_cached_tokens,
            finish_reason=update.finish_reason.value,
        )


def _kv_use(scheduler: Scheduler) -> KVUse:
    config: SchedulerConfig = scheduler.config
    running = scheduler.running.values()
    in_tables = sum(len(r.block_table) for r in running) * config.block_size
    return KVUse(
        num_running=len(running),
        reserved_model=len(running) * config.max_model_len,
        reserved_request=sum(r.most_tokens for r in running),
        in_tables=in_tables,
        held=(scheduler.pool.num_blocks - scheduler.pool.num_free) * config.block_size,
        unused=in_tables - sum(r.num_tokens for r in running),
    )


@contextmanager
def loaded_model(path: Path | None, args: EngineArgs) -> Iterator[Built]:
    """The model at `path`, or a tiny random one that is made for the occasion."""
    with TemporaryDirectory() as folder:
        if path is None:
            path = Path(folder) / "tiny"
            command = [sys.executable, "-m", "duetto", "make-model", "tiny", str(path)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        yield build(path, args)


def check_same_answers(runs: Sequence[Run]) -> None:
    """Raise if two runs of a workload differ in any token: then they did not do the same work."""
    for run in runs[1:]:
        if run.answers != runs[0].answers:
            raise RuntimeError("two configurations gave different answers to one workload")


def processor() -> str:
    """Its name, or what kind it is where the system does not tell."""
    kind = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return kind
    lines = cpuinfo.read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), kind)


def machine() -> str:
    """In words, with what else runs on it now: call it before measuring."""
    return (
        f"{processor()}, {os.cpu_count()} cores, {platform.system()}, Python "
        f"{platform.python_version()}, numpy {np.__version__}, load average before "
        f"{os.getloadavg()[0]:.1f}"
    )


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])
