"""langchain-openai: tools, structured output in its methods, streams, Responses."""

from checks import MODEL, QUESTION, needs, run

needs("langchain-openai", "langchain_openai")
from langchain_core.messages import HumanMessage, ToolMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402
from langchain_openai import ChatOpenAI  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402

model = ChatOpenAI(model=MODEL, max_tokens=200, max_retries=0, use_responses_api=False)
responses = ChatOpenAI(model=MODEL, max_tokens=200, max_retries=0, use_responses_api=True)


class Weather(BaseModel):
    """What the weather is."""

    city: str = Field(max_length=12)
    rains: bool


@tool
def weather(city: str) -> str:
    """What it will be like in a city."""
    return f"sun in {city}"


def invoke_and_stream():
    assert isinstance(model.invoke(QUESTION).content, str)
    whole = None
    for chunk in model.stream(QUESTION, stream_usage=True):
        whole = chunk if whole is None else whole + chunk
    assert whole.usage_metadata["output_tokens"]


def tools_twice_around():
    bound = model.bind_tools([weather], tool_choice="required", strict=True)
    got = bound.invoke(QUESTION, max_tokens=900)
    assert got.tool_calls[0]["name"] == "weather"
    call = got.tool_calls[0]
    result = ToolMessage(weather.invoke(call["args"])[:40], tool_call_id=call["id"])
    model.bind_tools([weather]).invoke([HumanMessage(QUESTION), got, result])


def structured_output():
    for method in ("json_schema", "function_calling"):
        got = model.with_structured_output(Weather, method=method).invoke(QUESTION)
        assert isinstance(got, Weather), method


def structured_output_streamed():
    *_, last = model.with_structured_output(Weather, method="json_schema").stream(QUESTION)
    assert isinstance(last, Weather)


def json_mode():
    got = model.bind(response_format={"type": "json_object"}).invoke(QUESTION)
    assert got.content.lstrip().startswith("{")


def responses_invoke_and_stream():
    assert responses.invoke(QUESTION).usage_metadata["output_tokens"]
    assert list(responses.stream(QUESTION))


def responses_tools_and_structure():
    bound = responses.bind_tools([weather], tool_choice="weather", strict=True)
    got = bound.invoke(QUESTION, max_tokens=900)
    call = got.tool_calls[0]
    result = ToolMessage("sun", tool_call_id=call["id"])
    responses.bind_tools([weather]).invoke([HumanMessage(QUESTION), got, result])
    structured = responses.with_structured_output(Weather, method="json_schema")
    assert isinstance(structured.invoke(QUESTION), Weather)


run(
    invoke_and_stream,
    tools_twice_around,
    structured_output,
    structured_output_streamed,
    json_mode,
    responses_invoke_and_stream,
    responses_tools_and_structure,
)
