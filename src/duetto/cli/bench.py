"""`duetto bench latency|throughput|serve|kernels`: measure a model in this process, or a server."""

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from cyclopts import App

from duetto.cli.default_model import open_llm
from duetto.cli.interrupt import INTERRUPTED, first_interrupt
from duetto.cli.output import Flat, JsonFlag, SloFlag, open_console, print_json, say
from duetto.cli.report import print_parts, print_report
from duetto.cli.server_url import server_url
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.files import check_folder
from duetto.measure.arrivals import ArrivalOptions
from duetto.measure.client import Target
from duetto.measure.dataset import DatasetOptions
from duetto.measure.latency import LatencyPlan, measure_latency
from duetto.measure.metrics import JsonValue, parse_percentiles, parse_slo
from duetto.measure.serve import Load, TokenCounter, find_model, run_serve
from duetto.measure.throughput import measure_throughput
from duetto.progress import show_progress

app = App(name="bench", help="Measure latency, throughput, and a server under load.")
app.command("duetto.cli.bench_kernels:kernels", name="kernels", help="Time a backend's kernels.")
app.command(
    "duetto.cli.bench_schedulers:schedulers",
    name="schedulers",
    help="Four schedulers under one load.",
)


@app.command
def latency(
    model: str | None = None,
    *,
    input_len: int = 32,
    output_len: int = 128,
    batch_size: int = 8,
    num_iters_warmup: int = 3,
    num_iters: int = 10,
    vocab_size: int = 256,
    as_json: JsonFlag = False,
    args: Annotated[EngineArgs | None, Flat] = None,
) -> None:
    """Time one batch of equal requests at a time, in this process.

    Parameters
    ----------
    model
        A checkpoint directory, or org/name on the Hugging Face hub; by default the small reader
        that ships with Duetto.
    input_len
        Tokens per prompt; every prompt is different, so no prefix is cached.
    output_len
        Tokens per answer.
    batch_size
        Requests that run together.
    num_iters_warmup
        Batches before the measured ones.
    num_iters
        Batches that are measured.
    vocab_size
        Token ids are drawn below this.
    as_json
        The last line of stdout is one JSON document.
    """
    args = args or EngineArgs()
    plan = LatencyPlan(
        input_len=input_len,
        output_len=output_len,
        batch_size=batch_size,
        num_iters_warmup=num_iters_warmup,
        num_iters=num_iters,
        vocab_size=vocab_size,
        seed=args.seed or 0,
    )
    num_batches = num_iters_warmup + num_iters
    with (
        open_llm(model, args) as llm,
        show_progress("batches", total=num_batches) as bar,
        first_interrupt() as llm.is_stopped,
    ):
        result = measure_latency(llm, plan, advance=bar.advance, is_stopped=llm.is_stopped)
    if result is None:
        _nothing_measured(as_json)
    elif as_json:
        print_json(result.as_json())
    else:
        console, batch = open_console(), result.batch
        print_report(result.report, console)
        say(console, f"batch latency, s: mean {batch.mean:.4f}, median {batch.median:.4f}")
        if result.is_interrupted:
            say(console, f"note: interrupted after {batch.count} of {num_iters} batches")
    if result is None or result.is_interrupted:
        sys.exit(INTERRUPTED)


@app.command
def throughput(
    model: str | None = None,
    *,
    slo: SloFlag = (),
    as_json: JsonFlag = False,
    dataset: Annotated[DatasetOptions | None, Flat] = None,
    args: Annotated[EngineArgs | None, Flat] = None,
) -> None:
    """Run a whole workload at once, in this process.

    Parameters
    ----------
    model
        A checkpoint directory, or org/name on the Hugging Face hub; by default the small reader
        that ships with Duetto.
    slo
        Limits for goodput, each with its unit, like ttft=1s,itl=50ms; of ttft, itl, tpot, e2e.
    as_json
        The last line of stdout is one JSON document.
    """
    limits = parse_slo(slo) if slo else None
    args = args or EngineArgs()
    with open_llm(model, args) as llm:
        tokenizer = llm.get_tokenizer()
        chosen = dataset or DatasetOptions()
        workload = chosen.load(lambda text: len(tokenizer.encode(text)), args.seed or 0)
        before = llm.computed_s
        with first_interrupt() as llm.is_stopped:
            result = measure_throughput(
                llm, workload, slo=limits, use_tqdm=True, is_stopped=llm.is_stopped
            )
        if result is not None and before:
            told = _waits(before, llm.computed_s, result.report.duration_s)
            result = replace(result, notes=(*result.notes, told))
    if result is None:
        _nothing_measured(as_json)
    elif as_json:
        print_json(result.as_json())
    else:
        console = open_console()
        print_report(result.report, console, notes=result.notes)
        print_parts(result.parts_s, console)
    if result is None or result.is_interrupted:
        sys.exit(INTERRUPTED)


def _waits(before: Sequence[float], after: Sequence[float], duration_s: float) -> str:
    """How long parts of a model waited: for each other, or for who decides and samples."""
    shares = [1 - (now - then) / duration_s for now, then in zip(after, before, strict=True)]
    told = ", ".join(f"{max(0.0, share):.1%}" for share in shares)
    return f"the parts of the model waited {told} of the time"


@app.command
def serve(
    *,
    base_url: str = "http://127.0.0.1:8000",
    backend: Literal["openai", "openai-chat"] = "openai",
    endpoint: str | None = None,
    model: str | None = None,
    num_warmups: int = 0,
    ignore_eos: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    extra_body: str = "{}",
    api_key: str | None = None,
    timeout: float = 600.0,
    slo: SloFlag = (),
    metric_percentiles: str = "50,90,99",
    result_filename: Path | None = None,
    save_detailed: bool = False,
    as_json: JsonFlag = False,
    dataset: Annotated[DatasetOptions | None, Flat] = None,
    arrivals: Annotated[ArrivalOptions | None, Flat] = None,
) -> None:
    """Drive any OpenAI-compatible server, and measure what its users would see.

    Parameters
    ----------
    base_url
        Where the server is, like 127.0.0.1:8000.
    backend
        openai sends to /v1/completions, openai-chat to /v1/chat/completions: there, texts are made
        whose prompts have the lengths asked for, by the server's /tokenize and /detokenize.
    endpoint
        Another path to send to.
    model
        The model's name; the first that the server names if left out.
    num_warmups
        Requests before the run that count nowhere.
    ignore_eos
        Ask for answers of exactly the dataset's lengths.
    temperature
        0 is greedy.
    seed
        Lengths, tokens and arrival times follow from it.
    extra_body
        A JSON object to add to every request.
    api_key
        The server's key; OPENAI_API_KEY from the environment if left out.
    timeout
        Seconds for a whole answer.
    slo
        Limits for goodput, each with its unit, like ttft=1s,itl=50ms; of ttft, itl, tpot, e2e.
    metric_percentiles
        Which percentiles to report.
    result_filename
        Write the JSON document to this file too.
    save_detailed
        Add one entry per request to that file.
    as_json
        The last line of stdout is one JSON document.
    """
    if result_filename is not None:
        check_folder("--result-filename", result_filename)
    base_url = server_url("--base-url", base_url)
    api_key = api_key or os.environ.get("OPENAI_API_KEY")
    dataset, arrivals = dataset or DatasetOptions(), arrivals or ArrivalOptions()
    load = Load(
        max_concurrency=arrivals.max_concurrency,
        is_closed_loop=arrivals.is_closed_loop,
        num_warmups=num_warmups,
        slo=parse_slo(slo) if slo else None,
        percentiles=parse_percentiles(metric_percentiles),
    )
    body = _extra_body(extra_body)
    target = Target(
        base_url=base_url,
        model=model or find_model(base_url, api_key),
        is_chat=backend == "openai-chat",
        endpoint=endpoint,
        api_key=api_key,
        ignore_eos=ignore_eos,
        temperature=temperature,
        extra_body=body,
        timeout_s=timeout,
    )
    count_tokens = TokenCounter(base_url, api_key, target.model)
    workload = dataset.load(count_tokens, seed)
    workload = replace(workload, notes=workload.notes + count_tokens.notes)
    workload = arrivals.apply(workload, has_times=dataset.has_times, seed=seed)
    with show_progress("requests", total=len(workload.requests)) as bar:
        driven = run_serve(target, workload, load, on_done=lambda _record: bar.advance())
        try:
            result = asyncio.run(driven)
        except KeyboardInterrupt:
            _nothing_measured(as_json)
            sys.exit(INTERRUPTED)
    about: dict[str, JsonValue] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": backend,
        "dataset_name": dataset.dataset_name,
        "num_prompts": len(workload.requests),
        **arrivals.as_json(),
    }
    if result_filename is not None:
        whole = about | result.as_json(detailed=save_detailed)
        result_filename.write_bytes(msgspec.json.encode(whole) + b"\n")
    if as_json:
        print_json(about | result.as_json())
    else:
        print_report(result.report, open_console(), notes=result.notes)
    if result.is_interrupted:
        sys.exit(INTERRUPTED)


def _nothing_measured(as_json: bool) -> None:
    print("interrupted: nothing was measured so far", file=sys.stderr)
    if as_json:
        print_json({"completed": 0, "interrupted": True})


def _extra_body(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--extra-body: {error}; must be a JSON object") from None
