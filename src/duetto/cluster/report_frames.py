"""A step's report as frames, and back. Knows no sockets."""

from collections.abc import Iterator
from dataclasses import replace

from duetto.cluster.frames import FrameError, ReportFrame, encoded
from duetto.core.batch import RequestUpdate
from duetto.engine.engine import StepReport


def report_frames(report: StepReport) -> Iterator[bytes]:
    """A report as one frame, or as several that say the same where one would be too large."""
    try:
        yield encoded(ReportFrame(report.updates, report.record))
    except FrameError:
        if not report.updates:  # a record alone: nobody waits for it
            return
        for part in _halves(report.updates):
            yield from report_frames(StepReport(part))
        if report.record is not None:
            yield from report_frames(StepReport((), report.record))


def _halves(
    updates: tuple[RequestUpdate, ...],
) -> tuple[tuple[RequestUpdate, ...], tuple[RequestUpdate, ...]]:
    """Updates in two parts, or one of them in two. Raises FrameError for what has no parts."""
    middle = len(updates) // 2
    if middle:
        return updates[:middle], updates[middle:]
    (update,) = updates
    scores, tokens = len(update.prompt_logprobs), len(update.tokens)
    if max(scores, tokens) < 2:
        raise FrameError(f"an update of one token of {update.request_id} is too large to be sent")
    first = RequestUpdate(
        update.request_id,
        update.tokens[: tokens // 2],
        update.prompt_logprobs[: (scores + 1) // 2],
        num_cached_tokens=update.num_cached_tokens,
    )
    rest = update._replace(
        tokens=update.tokens[tokens // 2 :],
        prompt_logprobs=update.prompt_logprobs[(scores + 1) // 2 :],
    )
    return (first,), (rest,)


def report_in(frame: ReportFrame, clock_offset: float) -> StepReport:
    """The report, with its instants on the receiver's clock: theirs is ahead by `clock_offset`."""
    updates = frame.updates
    if any(u.timings is not None for u in updates):
        updates = tuple([_with_timings(update, clock_offset) for update in updates])
    record = frame.record
    if record is not None and clock_offset:
        record = record._replace(
            start_time=record.start_time - clock_offset, end_time=record.end_time - clock_offset
        )
    return StepReport(updates, record)


def _with_timings(update: RequestUpdate, offset: float) -> RequestUpdate:
    timings = update.timings
    if timings is None:
        return update
    finish, first = timings.finish_time, timings.first_scheduled_time
    if offset:
        timings = replace(
            timings,
            arrival_time=timings.arrival_time - offset,
            first_scheduled_time=None if first is None else first - offset,
            token_times=[time - offset for time in timings.token_times],
            finish_time=None if finish is None else finish - offset,
        )
    if timings.finish_time is not None:  # nobody gives it to a constructor
        timings.accounted_until = timings.finish_time
    return update._replace(timings=timings)
