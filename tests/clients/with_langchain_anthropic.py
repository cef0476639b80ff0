"""langchain-anthropic: tools, structured output, streams, over Messages."""

from checks import MODEL, QUESTION, URL, needs, run

needs("langchain-anthropic", "langchain_anthropic")
from langchain_anthropic import ChatAnthropic  # noqa: E402
from langchain_core.messages import HumanMessage, ToolMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402
from pydantic import BaseModel  # noqa: E402

model = ChatAnthropic(model=MODEL, base_url=URL, api_key="none", max_tokens=200, max_retries=0)


class Rain(BaseModel):
    """Whether it rains."""

    rains: bool


@tool
def is_raining(today: bool) -> str:
    """Whether it rains."""
    return f"no {today}"


def invoke_and_stream():
    assert model.invoke(QUESTION).usage_metadata["output_tokens"]
    whole = None
    for chunk in model.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole.usage_metadata["output_tokens"]


def tools_twice_around():
    got = model.bind_tools([is_raining], tool_choice="any").invoke(QUESTION)
    call = got.tool_calls[0]
    result = ToolMessage(is_raining.invoke(call["args"]), tool_call_id=call["id"])
    model.bind_tools([is_raining]).invoke([HumanMessage(QUESTION), got, result])


def structured_output():
    for method in ("function_calling", "json_schema"):
        got = model.with_structured_output(Rain, method=method).invoke(QUESTION)
        assert isinstance(got, Rain), method


run(invoke_and_stream, tools_twice_around, structured_output)
