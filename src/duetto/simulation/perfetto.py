"""A simulation as Chrome trace events, which Perfetto (ui.perfetto.dev) loads.

A process for each replica (of a pipeline, for each batch that may be under way), with its steps and
counters; and one for the requests, in as few tracks as hold them without overlap. Written event by
event: a long trace has hundreds of thousands.
"""

import json
from collections.abc import Iterator
from heapq import heappop, heappush
from pathlib import Path

from duetto.core.trace_events import Event, counter, process_name, span
from duetto.simulation.replica import StepLog
from duetto.simulation.simulation import Served, Simulation

_REQUESTS = 1  # the process of the requests; replicas follow


def write_trace(simulation: Simulation, file: Path) -> None:
    """The same simulation gives the same bytes."""
    with file.open("w", encoding="utf-8") as out:
        out.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        separator = ""
        for event in trace_events(simulation):
            out.write(separator + json.dumps(event, separators=(",", ":")))
            separator = ",\n"
        out.write("\n]}\n")


def trace_events(simulation: Simulation) -> Iterator[Event]:
    process = _REQUESTS
    for name, logs, num_blocks in (
        ("prefill", simulation.prefill_steps, simulation.num_prefill_blocks),
        (
            "decode" if simulation.prefill_steps else "replica",
            simulation.steps,
            simulation.num_blocks,
        ),
    ):
        for number, log in enumerate(logs):
            process += 1
            replica, engine = divmod(number, simulation.num_batches)
            words = f"{name} {replica}"
            if simulation.num_batches > 1:
                words += f", batch {engine}"
            yield process_name(process, words)
            yield from _steps(log, process, num_blocks)
    yield process_name(_REQUESTS, "requests")
    for lane, served in _lanes(simulation):
        yield from _request(served, lane)


def _steps(log: StepLog, process: int, num_blocks: int) -> Iterator[Event]:
    columns = zip(
        log.start_time,
        log.end_time,
        log.num_tokens,
        log.num_prompt_tokens,
        log.num_running,
        log.num_waiting,
        log.num_free_blocks,
        log.num_preemptions,
        zip(log.num_drafts, log.num_accepted, log.drafting_s, strict=True),
        strict=True,
    )
    for start, end, tokens, prompts, running, waiting, free, preemptions, drafted in columns:
        args = {"tokens": tokens, "prompt_tokens": prompts, "preemptions": preemptions}
        drafts, accepted, drafting_s = drafted
        if drafts:
            args |= {"drafts": drafts, "accepted": accepted}
        yield span(process, 1, f"{tokens} tokens", start, end, **args)
        if drafting_s:
            yield span(process, 1, "drafting", end - drafting_s, end)
        yield counter(process, "requests", end, {"running": running, "waiting": waiting})
        yield counter(process, "KV blocks", end, {"used": num_blocks - free})


def _request(served: Served, lane: int) -> Iterator[Event]:
    timings = served.timings
    first, last = timings.token_times[0], timings.token_times[-1]
    begun = timings.first_scheduled_time
    args = {
        "request": served.index,
        "prompt_tokens": served.num_prompt_tokens,
        "cached_tokens": served.num_cached_tokens,
        "output_tokens": len(timings.token_times),
        "replica": served.replica,
        "preemptions": timings.num_preemptions,
    }
    yield span(_REQUESTS, lane, f"request {served.index}", timings.arrival_time, last, **args)
    if begun is not None:
        yield span(_REQUESTS, lane, "waiting", timings.arrival_time, begun)
        yield span(_REQUESTS, lane, "prompt", begun, first)
    decode = first + served.transfer_s
    if served.transfer_s:
        yield span(_REQUESTS, lane, "KV transfer", first, decode)
    if last > decode:
        yield span(_REQUESTS, lane, "decode", decode, last)


def _lanes(simulation: Simulation) -> Iterator[tuple[int, Served]]:
    """Each answered request with the lowest track that is free when it arrives."""
    busy: list[tuple[float, int]] = []  # until when, which; a heap
    free: list[int] = []
    num_lanes = 0
    for served in simulation.served:
        if served.refusal is not None:
            continue
        while busy and busy[0][0] <= served.timings.arrival_time:
            heappush(free, heappop(busy)[1])
        if not free:
            num_lanes += 1
            heappush(free, num_lanes)
        lane = heappop(free)
        heappush(busy, (served.timings.token_times[-1], lane))
        yield lane, served
