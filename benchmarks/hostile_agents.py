"""Large and hostile requests of agents beside a healthy client: how long the event loop is held.

    python benchmarks/hostile_agents.py
    python benchmarks/hostile_agents.py --only tools,items

As benchmarks/hostile.py, with a template that takes tools and says little, so that what is measured
is the way from a body to a grammar and back. The event loop is to be busy for no more than 50 ms in
one go (`stall_ms`; `alone_stall_ms` is what this machine's other work makes of it). The last line
of stdout is one JSON document.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hostile import CONFIG, Attack, Json, Result, measure, serving
from hostile_schemas import hostile_constraint
from structured import schema_of

# Of tools the names alone, and nothing around what is said: many fit into the context.
TEMPLATE = """\
{%- for tool in tools or [] %}{{- tool['function']['name'] }},{% endfor %}
{%- for message in messages %}{{- message['content'] or '' }}
{%- for call in message['tool_calls'] or [] %}
{{- call['function']['name'] }}{{ call['function']['arguments'] | tojson }}{% endfor %}
{%- endfor %}<|im_end|><|im_start|>assistant
"""
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
SAID: Json = {"messages": [{"role": "user", "content": "hi"}]}
NUM_TOOLS, NUM_ITEMS = 500, 2000
LARGEST = 2**18  # of a constraint


def parameters(seed: int, num_bytes: int = 120) -> Json:
    return schema_of(num_bytes, random.Random(seed))


def tools() -> list[Json]:
    return [{"name": f"t{i}", "parameters": parameters(i)} for i in range(NUM_TOOLS)]


def with_tools(**more: Any) -> Json:
    wrapped = [{"type": "function", "function": tool} for tool in tools()]
    return {**SAID, "tools": wrapped, "max_tokens": 40, **more}


def with_schema(schema: Any) -> Json:
    return {**SAID, "max_tokens": 40, "structured_outputs": {"json": schema}}


def items() -> list[Json]:
    """Turns, calls and their results."""
    made: list[Json] = []
    while len(made) < NUM_ITEMS:
        number = len(made)
        call = {"call_id": f"c{number}", "name": f"t{number % NUM_TOOLS}", "arguments": "{}"}
        made += [
            {"role": "user", "content": "hi"},
            {"type": "function_call", **call},
            {"type": "function_call_output", "call_id": f"c{number}", "output": "x"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "well"}]},
        ]
    return [*made, {"role": "user", "content": "hi"}]


def attacks() -> dict[str, Callable[[], Attack]]:
    """Made when they are used: some are large."""
    flat = [{"type": "function", **tool} for tool in tools()]
    named = [{"name": each["name"], "input_schema": each["parameters"]} for each in tools()]
    wide = {"enum": [f"{i}-{'x' * 40}" for i in range(LARGEST // 50)]}
    return {
        "tools": lambda: Attack(CHAT, [with_tools(n=8)] * 2, probe_bytes=5),
        "tools_required": lambda: Attack(
            CHAT, [with_tools(n=8, tool_choice="required")] * 2, probe_bytes=5
        ),
        "tools_streamed": lambda: Attack(CHAT, [with_tools(n=8, stream=True)] * 2, probe_bytes=5),
        "schemas": lambda: Attack(
            CHAT, [with_schema(parameters(i, 50_000)) for i in range(16)], probe_bytes=5
        ),
        "constraint": lambda: Attack(CHAT, [with_schema(wide)] * 4, probe_bytes=5),
        "regexes": lambda: Attack(
            "/v1/completions",
            [
                {"prompt": "a", "structured_outputs": {"regex": f"(a|b{i})*a(a|b){{16}}"}}
                for i in range(8)
            ],
            probe_bytes=5,
        ),
        "odd": lambda: Attack(
            CHAT,
            [
                {**SAID, "max_tokens": 40, "structured_outputs": hostile_constraint(i)}
                for i in range(64)
            ],
            probe_bytes=5,
        ),
        "items": lambda: Attack(
            RESPONSES, [{"input": items(), "max_output_tokens": 20}] * 4, probe_bytes=5
        ),
        "items_and_tools": lambda: Attack(
            RESPONSES,
            [{"input": items(), "tools": flat, "max_output_tokens": 20, "stream": True}] * 2,
            probe_bytes=5,
        ),
        "messages": lambda: Attack(
            MESSAGES,
            [{"messages": SAID["messages"] * NUM_ITEMS, "tools": named, "max_tokens": 20}] * 4,
            probe_bytes=5,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=12.0, help="of one attack, at most")
    parser.add_argument("--only", default="", help=f"some of {', '.join(attacks())}")
    asked = parser.parse_args()
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template.jinja"
        template.write_text(TEMPLATE)
        options = ["--chat-template", str(template), "--tool-call-parser", "hermes"]
        for name in asked.only.split(",") if asked.only else attacks():
            with serving(sys.executable, CONFIG["vocab_size"], 20.0, *options) as server:
                results[name] = measure(server, attacks()[name](), asked.seconds)
            print(f"{name}: {asdict(results[name])}", flush=True)
    print(json.dumps({name: asdict(result) for name, result in results.items()}))


if __name__ == "__main__":
    main()
