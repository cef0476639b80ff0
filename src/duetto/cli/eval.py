"""`duetto eval`: exact match on questions about held-out worlds, in this process or on a server."""

import os
from typing import Annotated

from cyclopts import Parameter
from rich.table import Table

from duetto.cli.default_model import model_or_demo
from duetto.cli.output import JsonFlag, open_console, print_json, say, show_table
from duetto.cli.server_url import server_url
from duetto.core.errors import ConfigError
from duetto.core.sampling_params import SamplingParams
from duetto.evals.evaluate import (
    MAX_ANSWER_TOKENS,
    EvalPlan,
    Evaluation,
    Item,
    ask_server,
    count_answers,
    draw_items,
)
from duetto.evals.worlds.world import DocumentOrder
from duetto.llm import LLM
from duetto.measure.client import Target
from duetto.measure.serve import find_model
from duetto.progress import show_progress


def evaluate(
    model: str | None = None,
    *,
    num_questions: int = 2000,
    num_documents: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (6,),
    order: Annotated[tuple[DocumentOrder, ...], Parameter(consume_multiple=True)] = ("shuffled",),
    documents: bool = True,
    kv: str = "full",
    quantization: str = "none",
    seed: int = 0,
    base_url: str | None = None,
    api_key: str | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Ask questions about documents of worlds that no demo model was trained on.

    Parameters
    ----------
    model
        A checkpoint directory or org/name, by default the small reader that ships with Duetto;
        with --base-url, the name that the server knows, by default the first that it names.
    num_questions
        Questions for each number and each order of documents, shared evenly by their kinds.
    num_documents
        Documents before each question; several numbers are reported one by one.
    order
        shuffled, or given (what belongs together stands together); both are reported one by one.
    documents
        With --no-documents questions are asked without any: what is known by heart.
    kv
        How the KV of documents is computed; full is the only way in this version.
    quantization
        How weights are quantized: none, int8, int4 or fp8; what a server has is its own
        business.
    seed
        Other seeds ask about other worlds.
    base_url
        Ask this OpenAI-compatible server instead of loading the model here.
    api_key
        The server's key; OPENAI_API_KEY from the environment if left out.
    as_json
        The last line of stdout is one JSON document.
    """
    plan = EvalPlan(
        num_questions=num_questions,
        num_documents=num_documents,
        orders=order,
        with_documents=documents,
        kv=kv,
        quantization=quantization,
        seed=seed,
    )
    if base_url is not None and quantization != "none":
        raise ConfigError(f"--quantization {quantization} and --base-url: serve it so instead")
    items = draw_items(plan)
    if base_url is not None:
        model, answers = _from_server(base_url, model, api_key, plan, items)
    else:
        model = model_or_demo(model)
        answers = _from_model(model, plan, items)
    result = count_answers(plan, items, answers)
    if as_json:
        print_json({"model": model, **result.as_json()})
    else:
        _print(result)


def _from_model(model: str, plan: EvalPlan, items: list[Item]) -> list[str | None]:
    params = SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS)
    with LLM(model, quantization=plan.quantization) as llm:
        outputs = llm.chat([item.messages(plan.with_documents) for item in items], params)
    completions = [output.outputs[0] for output in outputs]
    return [None if c.finish_reason == "error" else c.text for c in completions]


def _from_server(
    base_url: str, model: str | None, api_key: str | None, plan: EvalPlan, items: list[Item]
) -> tuple[str, list[str | None]]:
    base_url = server_url("--base-url", base_url)
    api_key = api_key or os.environ.get("OPENAI_API_KEY")
    model = model or find_model(base_url, api_key)
    target = Target(base_url=base_url, model=model, is_chat=True, api_key=api_key)
    conversations = [item.messages(plan.with_documents) for item in items]
    with show_progress("questions", total=len(items)) as bar:
        return model, ask_server(target, conversations, bar.advance)


def _print(result: Evaluation) -> None:
    console = open_console()
    table = Table(box=None)
    for name in ("documents", "order", "kind", "hops", "exact match", "95 % interval", "asked"):
        table.add_column(name, justify="left" if name in ("order", "kind") else "right")
    for row in result.rows:
        shown, (low, high) = row.as_json(), row.score.interval
        hops = shown["num_hops"]
        table.add_row(
            str(row.num_documents) if result.plan.with_documents else "removed",
            row.order,
            str(shown["kind"]),
            "" if hops is None else str(hops),
            f"{row.score.share:.1%}",
            f"{low:.1%} to {high:.1%}",
            str(row.score.num_asked),
        )
    show_table(console, table, drop=("asked", "95 % interval", "hops", "order"))
    if result.num_failed:
        say(console, f"{result.num_failed} questions were not answered; they count as wrong")
