"""litellm: as `openai/` (chat and Responses) and as `anthropic/`, and its own bridges."""

import json
import os

from checks import CITY, MODEL, QUESTION, URL, needs, run

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask GitHub for prices
litellm = needs("litellm", "litellm")

litellm.drop_params = False
litellm.suppress_debug_info = True
MESSAGES = [{"role": "user", "content": QUESTION}]
OPENAI = {"model": f"openai/{MODEL}", "api_base": URL + "/v1", "api_key": "none"}
ANTHROPIC = {"model": f"anthropic/{MODEL}", "api_base": URL, "api_key": "none"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
BOTH = (OPENAI, ANTHROPIC)


def text_and_its_stream():
    for where in BOTH:
        asked = {**where, "messages": MESSAGES, "max_tokens": 20}
        assert litellm.completion(**asked).usage.completion_tokens, where
        assert list(litellm.completion(**asked, stream=True)), where


def tools():
    for where in BOTH:
        asked = {**where, "messages": MESSAGES, "max_tokens": 200, "tools": [TOOL]}
        got = litellm.completion(**asked, tool_choice="required").choices[0]
        assert got.finish_reason == "tool_calls", where
        call = got.message.tool_calls[0]
        assert set(json.loads(call.function.arguments)) == {"city", "days"}, where
        result = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
        litellm.completion(**{**asked, "messages": [*MESSAGES, got.message, result]})


def structured_output():
    schema = {"name": "weather", "schema": CITY, "strict": True}
    wanted = {"type": "json_schema", "json_schema": schema}
    asked = {**OPENAI, "messages": MESSAGES, "max_tokens": 200, "response_format": wanted}
    text = litellm.completion(**asked).choices[0].message.content
    assert set(json.loads(text)) == {"city", "days"}


def responses():
    asked = {**OPENAI, "input": QUESTION, "max_output_tokens": 20}
    assert litellm.responses(**asked).usage.output_tokens
    assert list(litellm.responses(**asked, stream=True))


run(text_and_its_stream, tools, structured_output, responses)
