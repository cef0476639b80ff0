"""Whole numbers with units, and flags that are given twice, on every command line."""

from collections.abc import Iterator
from typing import Any

import pytest
from cyclopts import App

from duetto.cli.app import app
from duetto.cli.units import read_whole
from duetto.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4096", 4096), ("4k", 4000), ("4K", 4000), ("4Ki", 4096), ("4ki", 4096), ("1.5k", 1500),
        ("2M", 2_000_000), ("2Mi", 2**21), ("1G", 10**9), ("1g", 10**9), ("1Gi", 2**30),
        ("3T", 3 * 10**12), ("1Ti", 2**40), ("1_000", 1000), ("-1", -1), ("0.5Ki", 512),
        ("8 k", 8000),
    ],
)  # fmt: skip
def test_a_unit_has_one_meaning(text: str, number: int) -> None:
    assert read_whole(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("16GB", 16 * 10**9), ("512MiB", 2**29), ("1.5GiB", 3 * 2**29), ("7B", 7), ("1kb", 1000)],
)
def test_bytes_may_be_called_so(text: str, number: int) -> None:
    assert read_whole(text, in_bytes=True) == number
    with pytest.raises(ValueError, match=text):
        read_whole(text)


@pytest.mark.parametrize(
    "text", ["", "k", "4x", "1.5", "1.0001k", "4kk", "4 4", "0x10", "inf", "nan", "1e3", "four"]
)
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(ValueError, match=text or "^$"):
        read_whole(text)


def parse(*words: str) -> dict[str, Any]:
    _command, bound, _ignored = app.parse_args(list(words), exit_on_error=False, print_error=False)
    return bound.arguments


def test_every_command_takes_units() -> None:
    served = parse("serve", "--kv-cache-memory-bytes", "1.5GiB", "--max-model-len=4k")
    assert served["args"].kv_cache_memory_bytes == 3 * 2**29
    assert served["args"].max_model_len == 4000
    assert parse("serve", "--max-model-len", "auto")["args"].max_model_len is None
    priced = parse("roofline", "llama-3-8b", "--context", "32Ki", "--chunk", "2k", "--batch", "1k")
    assert (priced["context"], priced["chunk"], priced["batch"]) == (32768, 2000, 1000)
    planned = parse("plan", "m", "--hardware", "h100", "--slo", "itl=1s", "--budgets", "1k", "8Ki")
    assert planned["budgets"] == (1000, 8192)
    simulated = parse("simulate", "m", "--hardware", "h100", "--random-input-len", "4k")
    assert simulated["load"].random_input_len == 4000
    assert parse("bench", "kernels", "--rows", "1", "1k")["rows"] == (1, 1000)
    assert parse("bench", "serve", "--num-prompts", "1k")["dataset"].num_prompts == 1000
    assert parse("eval", "--num-documents", "6", "1k")["num_documents"] == (6, 1000)


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("50", 50), ("50ms", 50), ("0.25s", 250), ("1 s", 1000), (".5S", 500), ("1e2", 100)],
)
def test_times_take_units(text: str, milliseconds: float) -> None:
    assert parse("serve", "--target-itl", text)["args"].target_itl == milliseconds
    waits = parse("bench", "serve", "--timeout", text)["timeout"]
    assert waits == (milliseconds / 1000 if "s" in text.lower() else milliseconds)


def test_every_flag_of_a_time_takes_units() -> None:
    served = parse(
        "serve", "--step-timeout-s", "90s", "--shutdown-timeout", "500ms",
        "--sse-keep-alive-interval", "2s", "--target-itl", "off",
    )  # fmt: skip
    options = served["options"]
    assert (options.step_timeout_s, options.shutdown_timeout) == (90, 0.5)
    assert (options.sse_keep_alive_interval, served["args"].target_itl) == (2, "off")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("serve", "--target-itl", "50us"), "--target-itl 50us: must be milliseconds.* or auto, o"),
        (("bench", "serve", "--timeout", "soon"), "--timeout soon: must be seconds, or a time"),
        (("serve", "--kv-cache-memory-bytes", "1Q"), "--kv-cache-memory-bytes 1Q: .* like 512MiB"),
        (("serve", "--max-model-len", "4GB"), "--max-model-len 4GB: .*4Ki.* or auto"),
        (("roofline", "m", "--context", "4.5"), "--context 4.5: must be a whole number"),
        (("bench", "latency", "--input-len", "1.5"), "--input-len 1.5: must be a whole number"),
    ],
)
def test_other_numbers_are_refused_by_their_flag(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*words)


def commands(of: App = app, *path: str) -> Iterator[tuple[str, ...]]:
    """Every command that can be run."""
    for name in of:
        if not name.startswith("-"):
            yield from commands(of[name], *path, name)
    if path and of.default_command is not None:
        yield path


ALL = tuple(commands())
NEEDED = {
    ("make-model",): ("tiny", "there"),
    ("roofline",): ("tiny",),
    ("fit",): ("tiny",),
    ("simulate",): ("tiny", "--hardware", "h100"),
    ("plan",): ("tiny", "--hardware", "h100:2", "--slo", "itl=1s"),
    ("planner",): ("a:1", "--model", "tiny", "--slo-ttft", "1s", "--slo-tpot", "1s"),
    ("run-batch",): ("-i", "in.jsonl", "-o", "out.jsonl"),
}


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_of_a_flag_that_is_given_twice_the_last_one_counts(path: tuple[str, ...]) -> None:
    start = (*path, *NEEDED.get(path, ()))
    num_tried = 0
    _, apps, _ = app.parse_commands(list(path))
    for argument in apps[-1].assemble_argument_collection():
        name, off = argument.name, [n for n in argument.negatives if n.startswith("--no-")]
        first, last = {
            int: ([name, "3"], [name, "4"]),
            float: ([name, "0.25"], [name, "0.5"]),
            str: ([name, "a"], [f"{name}=b"]),
            bool: ([name], [*off, name][:1]),
        }.get(argument.hint, ([], []))
        if argument.index is None and last:
            num_tried += 1
            assert parse(*start, *first, *last) == parse(*start, *last), name
    assert num_tried > 0


def test_flags_with_several_values_still_gather_them() -> None:
    assert parse("serve", "--api-key", "a", "--api-key", "b")["options"].api_key == ("a", "b")
    skip = ("--quantization-skip", "a", "--quantization-skip", "b")
    skipped = parse("serve", "--quantization", "int8", *skip)
    assert skipped["args"].quantization_skip == ("a", "b")
    assert parse("complete", "--stop", "a", "--stop", "b")["stop"] == ("a", "b")
    assert parse("bench", "kernels", "--rows", "1", "2", "--rows", "3")["rows"] == (1, 2, 3)


def test_a_model_may_have_several_names() -> None:
    named = parse("serve", "--served-model-name", "a", "--served-model-name=b", "dir")
    assert (named["options"].served_model_name, named["model"]) == (("a", "b"), "dir")
    assert parse("serve", "--any-model-name")["options"].any_model_name is True
