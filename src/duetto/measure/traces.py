"""Recorded workloads: Azure's CSV, Mooncake's JSONL and ShareGPT's JSON, as Workload.

No file holds token ids. Azure and Mooncake hold lengths, so ids are drawn; Mooncake's block hashes
become the same ids wherever they appear, so that a prefix cache finds what it would have found.
Knows no tokenizer: ShareGPT's lengths come from a function.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from numpy.random import default_rng

from duetto.core.errors import ConfigError
from duetto.measure.workload import Workload, WorkloadRequest, check_vocab_size

MOONCAKE_BLOCK = 512  # tokens per hash id


class TraceError(ConfigError):
    """A trace file cannot be read: which file, which line, and what is accepted."""

    def __init__(self, file: Path, line: int | None, cause: str) -> None:
        where = f"{file}" if line is None else f"{file}:{line}"
        super().__init__(f"{where}: {cause}")


@dataclass(frozen=True, slots=True)
class TraceFit:
    """How a trace of a large model's traffic is made to fit a smaller one."""

    length_scale: float = 1.0  # multiplies every length
    max_input_len: int | None = None  # longer prompts lose their end
    max_output_len: int | None = None

    def __post_init__(self) -> None:
        if not self.length_scale > 0:
            raise ConfigError(f"--trace-length-scale {self.length_scale}: must be above 0")
        for flag, value in (
            ("--max-input-len", self.max_input_len),
            ("--max-output-len", self.max_output_len),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{flag} {value}: must be 1 or more")

    def scaled(self, length: int) -> int:
        return max(1, round(length * self.length_scale))

    def notes(self, inputs: list[int], outputs: list[int]) -> tuple[str, ...]:
        """What the limits changed, given the lengths before them."""
        notes = [] if self.length_scale == 1 else [f"lengths are times {self.length_scale:g}"]
        for what, lengths, limit in (
            ("prompts", inputs, self.max_input_len),
            ("outputs", outputs, self.max_output_len),
        ):
            cut = 0 if limit is None else sum(length > limit for length in lengths)
            if cut:
                notes.append(f"{cut} of {len(lengths)} {what} are cut to {limit} tokens")
        return tuple(notes)


AS_RECORDED = TraceFit()


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request, as its file has it."""

    arrival_s: float  # azure: after the first row; mooncake: as recorded
    num_input: int
    num_output: int
    hash_ids: tuple[int, ...] = ()  # mooncake: one per MOONCAKE_BLOCK tokens of input


def azure_rows(file: Path, num_requests: int | None = None) -> list[TraceRow]:
    """Azure's LLM inference trace: TIMESTAMP,ContextTokens,GeneratedTokens with a header line.

    (Patel et al., Splitwise, ISCA 2024.) Reads at most the first `num_requests`. Raises TraceError
    for what is no such row, and where time goes backwards.
    """
    with _opened(file) as lines:
        reader = csv.DictReader(lines)
        columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise TraceError(
                file, 1, f"no column {', '.join(missing)}; accepted: a CSV with {','.join(columns)}"
            )
        timed = [
            (
                _timestamp(file, line, row["TIMESTAMP"]),
                _length(file, line, "ContextTokens", row["ContextTokens"]),
                _length(file, line, "GeneratedTokens", row["GeneratedTokens"]),
            )
            for line, row in enumerate(islice(reader, num_requests), start=2)
        ]
    _check_not_empty(file, timed, line=1)
    start = timed[0][0]
    rows = [TraceRow((t - start) / timedelta(seconds=1), n, m) for t, n, m in timed]
    _check_order(file, range(2, len(rows) + 2), rows)
    return rows


def read_azure(
    file: Path,
    *,
    vocab_size: int,
    num_requests: int | None = None,
    fit: TraceFit = AS_RECORDED,
    seed: int = 0,
) -> Workload:
    """`azure_rows` with prompts: the trace records no contents, so every prompt is different."""
    check_vocab_size(vocab_size)
    rows = azure_rows(file, num_requests)
    inputs = [fit.scaled(row.num_input) for row in rows]
    outputs = [fit.scaled(row.num_output) for row in rows]
    rng = default_rng(seed)
    requests = tuple(
        WorkloadRequest(
            arrival_s=row.arrival_s,
            prompt_token_ids=tuple(rng.integers(vocab_size, size=num_input).tolist()),
            num_output_tokens=num_output,
        )
        for row, num_input, num_output in zip(
            rows, _cut(inputs, fit.max_input_len), _cut(outputs, fit.max_output_len), strict=True
        )
    )
    return Workload(requests, fit.notes(inputs, outputs))


class _MooncakeRow(msgspec.Struct):
    timestamp: float  # milliseconds
    input_length: int
    output_length: int
    hash_ids: list[int]


def mooncake_rows(file: Path, num_requests: int | None = None) -> list[TraceRow]:
    """Mooncake's trace (Qin et al., FAST 2025): JSON lines with hash_ids of 512-token blocks.

    A hash id stands for the same tokens in every request; the last block of a prompt may be
    partial. Reads at most the first `num_requests`. Raises TraceError for what is no such row, and
    where time goes backwards.
    """
    with _opened(file) as lines:
        numbered = ((n, text) for n, text in enumerate(lines, start=1) if text.strip())
        read = [(n, _mooncake_row(file, n, text)) for n, text in islice(numbered, num_requests)]
    _check_not_empty(file, read, line=1)
    rows = [
        TraceRow(r.timestamp / 1000, r.input_length, r.output_length, tuple(r.hash_ids))
        for _, r in read
    ]
    _check_order(file, [n for n, _ in read], rows)
    return rows


def read_mooncake(
    file: Path,
    *,
    vocab_size: int,
    num_requests: int | None = None,
    fit: TraceFit = AS_RECORDED,
    seed: int = 0,
) -> Workload:
    """`mooncake_rows` with prompts: equal hash ids become equal tokens.

    A length scale scales the block too, so that what was shared stays shared.
    """
    check_vocab_size(vocab_size)
    block_size = fit.scaled(MOONCAKE_BLOCK)
    rows = mooncake_rows(file, num_requests)

    def prompt(row: TraceRow, length: int) -> tuple[int, ...]:
        ids: list[int] = []
        for hash_id in row.hash_ids:
            ids += default_rng((seed, hash_id)).integers(vocab_size, size=block_size).tolist()
            if len(ids) >= length:
                break
        return tuple(ids[:length])

    inputs = [scaled_input(row, fit) for row in rows]
    outputs = [fit.scaled(row.num_output) for row in rows]
    requests = tuple(
        WorkloadRequest(
            arrival_s=row.arrival_s,
            prompt_token_ids=prompt(row, num_input),
            num_output_tokens=num_output,
        )
        for row, num_input, num_output in zip(
            rows, _cut(inputs, fit.max_input_len), _cut(outputs, fit.max_output_len), strict=True
        )
    )
    return Workload(requests, fit.notes(inputs, outputs))


def scaled_input(row: TraceRow, fit: TraceFit) -> int:
    """The prompt's length under `fit`, before any cut; blocks scale one by one."""
    if not row.hash_ids:
        return fit.scaled(row.num_input)
    num_full = len(row.hash_ids) - 1
    partial = row.num_input - num_full * MOONCAKE_BLOCK
    block_size = fit.scaled(MOONCAKE_BLOCK)
    return num_full * block_size + min(block_size, fit.scaled(partial))


def read_sharegpt(
    file: Path,
    *,
    count_tokens: Callable[[str], int],
    num_requests: int | None = None,
    output_len: int | None = None,
    fit: TraceFit = AS_RECORDED,
) -> Workload:
    """ShareGPT conversations: the first turn is the prompt, the second one's length the output's.

    As in vLLM, a conversation is left out if it has fewer than two turns, a prompt below 4 or
    above 1024 tokens, an answer below 4, or above 2048 together; `output_len` replaces the
    answer's length. Prompts are text and are never cut: with `fit.max_input_len`, longer ones are
    left out. Raises TraceError.
    """
    requests: list[WorkloadRequest] = []
    outputs: list[int] = []
    num_left_out = 0
    for prompt, answer in _conversations(file):
        if num_requests is not None and len(requests) == num_requests:
            break
        num_input = count_tokens(prompt)
        num_output = count_tokens(answer) if output_len is None else output_len
        longest = min(1024, fit.max_input_len or 1024)
        too_short = num_input < 4 or (output_len is None and num_output < 4)
        if too_short or num_input > longest or num_input + num_output > 2048:
            num_left_out += 1
            continue
        outputs.append(fit.scaled(num_output))
        (num_output,) = _cut(outputs[-1:], fit.max_output_len)
        requests.append(
            WorkloadRequest(
                prompt_text=prompt, num_prompt_tokens=num_input, num_output_tokens=num_output
            )
        )
    _check_not_empty(file, requests)
    notes = fit.notes([], outputs)
    if num_left_out:
        notes += (f"{num_left_out} conversations are left out: too short or too long",)
    return Workload(tuple(requests), notes)


def _conversations(file: Path) -> Iterator[tuple[str, str]]:
    """First and second turns. The file is one JSON list: errors name the entry, not a line."""
    accepted = 'accepted: a list of {"conversations": [{"from": ..., "value": ...}, ...]}'
    try:
        entries = msgspec.json.decode(file.read_bytes(), type=list[dict[str, Any]])
    except OSError as error:
        raise TraceError(file, None, error.strerror or str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TraceError(file, None, f"{error}; {accepted}") from None
    for number, entry in enumerate(entries, start=1):
        turns = entry.get("conversations", entry.get("conversation"))
        if not isinstance(turns, list):
            raise TraceError(file, None, f"entry {number} has no conversations; {accepted}")
        if len(turns) < 2:
            continue
        first, second = (t.get("value") if isinstance(t, dict) else None for t in turns[:2])
        if not isinstance(first, str) or not isinstance(second, str):
            raise TraceError(file, None, f"entry {number} has a turn without a text; {accepted}")
        yield first, second


def _mooncake_row(file: Path, line: int, text: str) -> _MooncakeRow:
    try:
        row = msgspec.json.decode(text, type=_MooncakeRow)
    except msgspec.DecodeError as error:
        raise TraceError(
            file,
            line,
            f'{error}; accepted: {{"timestamp": ms, "input_length": n, "output_length": n, '
            f'"hash_ids": [...]}}',
        ) from None
    for name in ("input_length", "output_length"):
        _length(file, line, name, str(getattr(row, name)))
    needed = -(-row.input_length // MOONCAKE_BLOCK)
    if len(row.hash_ids) != needed or any(hash_id < 0 for hash_id in row.hash_ids):
        raise TraceError(
            file,
            line,
            f"{len(row.hash_ids)} hash_ids for {row.input_length} tokens; accepted: {needed} "
            f"numbers of 0 or more, one per {MOONCAKE_BLOCK} tokens",
        )
    return row


def _opened(file: Path) -> Any:
    try:
        return file.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise TraceError(file, None, error.strerror or str(error)) from None


def _timestamp(file: Path, line: int, text: str | None) -> datetime:
    """The file's seven fractional digits lose their last one. Later traces carry an offset."""
    try:
        time = datetime.fromisoformat(text or "")
        return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
    except ValueError:
        raise TraceError(
            file, line, f"TIMESTAMP {text!r} is not a time; accepted: 2023-11-16 18:15:46.6805900"
        ) from None


def _length(file: Path, line: int, name: str, text: str | None) -> int:
    if text is None or not text.isdecimal() or int(text) < 1:
        raise TraceError(file, line, f"{name} is {text!r}; accepted: a whole number of 1 or more")
    return int(text)


def _check_order(file: Path, lines: Sequence[int], rows: Sequence[TraceRow]) -> None:
    for line, before, row in zip(lines[1:], rows, rows[1:], strict=False):
        if row.arrival_s < before.arrival_s:
            back = before.arrival_s - row.arrival_s
            raise TraceError(
                file, line, f"its time is {back:g} s before the row above; accepted: rows in order"
            )


def _cut(lengths: list[int], limit: int | None) -> list[int]:
    return lengths if limit is None else [min(length, limit) for length in lengths]


def _check_not_empty(file: Path, rows: list[Any], line: int | None = None) -> None:
    if not rows:
        raise TraceError(file, line, "no requests in it")
