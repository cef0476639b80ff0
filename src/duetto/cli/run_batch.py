"""`duetto run-batch`: a file of requests, answered into another file."""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter
from starlette.applications import Starlette

from duetto import __version__
from duetto.build import Built, build, reuse_choice, reuse_rules
from duetto.cli.default_model import say_that_none_was_named
from duetto.cli.interrupt import INTERRUPTED, first_interrupt
from duetto.cli.output import Flat, JsonFlag, open_console, print_json, say
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.reuse_choice import OFF
from duetto.demo import demo_model_dir
from duetto.engine.thread import in_thread
from duetto.progress import show_progress
from duetto.server.app import create_app
from duetto.server.batch_file import BatchCounts, BatchFile
from duetto.server.settings import ServerSettings

SOME_FAILED = 1  # the exit code; the output says which, and why


def run_batch(
    model: str | None = None,
    *,
    input_file: Annotated[Path, Parameter(name=("--input-file", "-i"))],
    output_file: Annotated[Path, Parameter(name=("--output-file", "-o"))],
    served_model_name: Annotated[tuple[str, ...], Parameter(show_default=False, negative="")] = (),
    any_model_name: Annotated[bool, Parameter(negative="")] = False,
    as_json: JsonFlag = False,
    args: Annotated[EngineArgs | None, Flat] = None,
) -> None:
    """Answer a file of requests, in the format of OpenAI's Batch API.

    Each line is an object with custom_id, url (/v1/chat/completions, /v1/completions,
    /v1/responses or /v1/embeddings) and body. Each answer is appended to the output as it comes,
    in no order. What has an answer there is not asked again, so the same command goes on where one
    was stopped.

    Parameters
    ----------
    model
        A checkpoint directory, or org/name on the Hugging Face hub; by default the small reader
        that ships with Duetto.
    input_file
        The requests, one JSON object a line.
    output_file
        Where the answers go; what is there stays. The exit code is 1 if any line failed (was
        refused, or is no request): its error is there.
    served_model_name
        The name that bodies call the model by; may be repeated. By default that of the directory.
    any_model_name
        Accept whatever name bodies have.
    as_json
        The last line of stdout is one JSON document.
    """
    args = args or EngineArgs()
    if not input_file.is_file():
        raise ConfigError(f"--input-file: {input_file} is no file")
    if not output_file.parent.is_dir():
        raise ConfigError(f"--output-file: {output_file.parent} is no directory")
    built = build(str(demo_model_dir()) if model is None else model, args)
    if model is None:
        say_that_none_was_named()
    num_at_once = 2 * built.scheduler_config.max_num_seqs  # the engine never waits for the next
    names = served_model_name or (built.name,)
    settings = replace(_settings(built, args), served_model_name=names[0])
    settings = replace(
        settings,
        other_model_names=names[1:],
        accepts_any_model=any_model_name,
        max_num_queued_reqs=num_at_once * settings.max_answers,
    )
    with input_file.open("rb") as lines:
        num_lines = sum(1 for line in lines if line.strip())
    with (
        show_progress("requests", total=num_lines) as bar,
        first_interrupt() as is_stopped,
    ):
        batch = BatchFile(_app(built, settings), input_file, output_file, bar.advance)
        counts = asyncio.run(batch.run(num_at_once, is_stopped))
    _report(counts, output_file, as_json=as_json)


def _settings(built: Built, args: EngineArgs) -> ServerSettings:
    return ServerSettings(
        served_model_name=built.name,
        version=__version__,
        seed=args.seed,
        default_sampling=built.default_sampling,
        model_root=str(built.root),
        dtype=built.model.dtype,
        quantization=built.model.quantization,
        kv_cache_dtype=built.model.kv_dtype,
        backend=built.model.computed_by,
        max_drafts=built.model.max_drafts,
        embeddings=built.model.embeddings,
        reuse=reuse_rules(built, reuse_choice(OFF), allow_unmeasured=False),
        max_stored_bytes=0,
    )


def _app(built: Built, settings: ServerSettings) -> Starlette:
    return create_app(
        open_engine=in_thread(built.engine),
        codec=built.codec,
        config=built.scheduler_config,
        settings=settings,
        grammars=built.grammars,
        speech=built.speech,
    )


def _report(counts: BatchCounts, output_file: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(msgspec.to_builtins(counts))
    else:
        told = [f"{counts.num_answered} answered", f"{counts.num_failed} failed"]
        there = f"{counts.num_skipped} were there"
        if counts.num_skipped_failed:
            there += f" ({counts.num_skipped_failed} of them failures)"
        told += [there] if counts.num_skipped else []
        say(open_console(), f"{', '.join(told)}: {output_file}")
    if counts.is_stopped:
        print("duetto: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if counts.num_failed or counts.num_skipped_failed:
        sys.exit(SOME_FAILED)
