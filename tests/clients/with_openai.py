"""openai-python: chat with tools, the stream helper, `.parse`, Responses."""

import json

from checks import CITY, MODEL, QUESTION, needs, run

openai = needs("openai", "openai")
from pydantic import BaseModel, Field  # noqa: E402

client = openai.OpenAI(max_retries=0)
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
FLAT = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}


class Weather(BaseModel):
    city: str = Field(max_length=12)
    rains: bool


def chat_text_and_its_stream():
    text = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20, seed=1)
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=20, seed=1, stream=True
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == text.choices[0].message.content


def chat_tools_twice_around():
    asked = {"model": MODEL, "tools": [TOOL], "max_tokens": 200}
    got = client.chat.completions.create(**asked, messages=MESSAGES, tool_choice="required")
    (choice,) = got.choices
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
    again = client.chat.completions.create(**asked, messages=[*MESSAGES, choice.message, result])
    assert again.choices[0].finish_reason in ("stop", "length", "tool_calls")


def chat_stream_helper_with_tools():
    with client.chat.completions.stream(
        model=MODEL,
        messages=MESSAGES,
        tools=[{**TOOL, "function": {**TOOL["function"], "strict": True}}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=200,
        stream_options={"include_usage": True},
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    function = final.choices[0].message.tool_calls[0].function
    assert set(function.parsed_arguments) == {"city", "days"} and final.usage.total_tokens


def chat_parse():
    got = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Weather, max_tokens=200
    )
    assert isinstance(got.choices[0].message.parsed, Weather)


def chat_parse_pydantic_tool():
    got = client.chat.completions.parse(
        model=MODEL,
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        max_tokens=200,
    )
    call = got.choices[0].message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Weather)


def chat_stream_helper_parses():
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=Weather, max_tokens=200
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Weather)


def responses_create_and_go_on():
    first = client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=20)
    assert first.output_text and first.usage.output_tokens
    second = client.responses.create(
        model=MODEL,
        input="And in Oslo?",
        instructions="Be short.",
        previous_response_id=first.id,
        max_output_tokens=20,
    )
    assert second.previous_response_id == first.id
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert client.responses.input_items.list(second.id).data
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
    except openai.NotFoundError:
        return
    raise AssertionError("a deleted response is still there")


def responses_stream_helper():
    with client.responses.stream(model=MODEL, input=QUESTION, max_output_tokens=20) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text


def responses_events():
    events = list(
        client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=20, stream=True)
    )
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")


def responses_tools_twice_around():
    asked = {"model": MODEL, "tools": [FLAT], "max_output_tokens": 200}
    got = client.responses.create(**asked, input=QUESTION, tool_choice="required")
    call = next(item for item in got.output if item.type == "function_call")
    assert set(json.loads(call.arguments)) == {"city", "days"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    stored = client.responses.create(**asked, input=[result], previous_response_id=got.id)
    items = [{"role": "user", "content": QUESTION}, *got.output, result]
    sent = client.responses.create(**asked, input=items, store=False)
    assert stored.usage.input_tokens == sent.usage.input_tokens


def responses_parse():
    got = client.responses.parse(
        model=MODEL, input=QUESTION, text_format=Weather, max_output_tokens=200
    )
    assert isinstance(got.output_parsed, Weather)
    with client.responses.stream(
        model=MODEL, input=QUESTION, text_format=Weather, max_output_tokens=200
    ) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Weather)


def responses_tool_parse():
    with client.responses.stream(
        model=MODEL,
        input=QUESTION,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        max_output_tokens=200,
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert isinstance(final.output[0].parsed_arguments, Weather)


def errors_name_the_field():
    for asked in (
        lambda: client.responses.create(model=MODEL, input="x", temperature=-1),
        lambda: client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1),
    ):
        try:
            asked()
        except openai.BadRequestError as error:
            assert error.param == "temperature"
        else:
            raise AssertionError("no error")


run(
    chat_text_and_its_stream,
    chat_tools_twice_around,
    chat_stream_helper_with_tools,
    chat_parse,
    chat_parse_pydantic_tool,
    chat_stream_helper_parses,
    responses_create_and_go_on,
    responses_stream_helper,
    responses_events,
    responses_tools_twice_around,
    responses_parse,
    responses_tool_parse,
    errors_name_the_field,
)
