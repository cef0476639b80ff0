"""anthropic-python: messages, the stream helper, tools, count_tokens, errors."""

from checks import CITY, MODEL, QUESTION, URL, needs, run

anthropic = needs("anthropic", "anthropic")

client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOL = {"name": "weather", "description": "what it will be like", "input_schema": CITY}


def create():
    got = client.messages.create(
        model=MODEL, max_tokens=20, messages=MESSAGES, system=[{"type": "text", "text": "Short."}]
    )
    assert got.role == "assistant" and got.content[0].type == "text"
    assert got.stop_reason in ("end_turn", "max_tokens") and got.usage.output_tokens


def stream_helper():
    with client.messages.stream(model=MODEL, max_tokens=20, messages=MESSAGES) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].text == text and final.usage.output_tokens


def raw_events():
    events = client.messages.create(model=MODEL, max_tokens=20, messages=MESSAGES, stream=True)
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]


def tools_twice_around():
    asked = {"model": MODEL, "max_tokens": 200, "tools": [TOOL]}
    got = client.messages.create(**asked, messages=MESSAGES, tool_choice={"type": "any"})
    assert got.stop_reason == "tool_use"
    call = next(block for block in got.content if block.type == "tool_use")
    assert set(call.input) == {"city", "days"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sun"}
    turns = [{"role": "assistant", "content": got.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**asked, messages=[*MESSAGES, *turns]).usage.input_tokens


def tools_streamed():
    with client.messages.stream(
        model=MODEL,
        max_tokens=200,
        messages=MESSAGES,
        tools=[{**TOOL, "cache_control": {"type": "ephemeral"}}],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert "input_json" in kinds and set(final.content[0].input) == {"city", "days"}


def tool_runner():
    @anthropic.beta_tool
    def weather(city: str) -> str:
        """What it will be like.

        Args:
            city: where
        """
        return f"sun in {city}"

    runner = client.beta.messages.tool_runner(
        model=MODEL, max_tokens=100, messages=MESSAGES, tools=[weather], max_iterations=2
    )
    assert list(runner)


def structured_output():
    got = client.messages.create(
        model=MODEL,
        max_tokens=200,
        messages=MESSAGES,
        output_config={"format": {"type": "json_schema", "schema": CITY}},
    )
    assert got.content[0].text.startswith("{")


def count_tokens():
    got = client.messages.count_tokens(model=MODEL, messages=MESSAGES, tools=[TOOL], system="Hi")
    assert got.input_tokens > 10


def errors_have_their_types():
    for change, kind in (
        ({"model": "none"}, anthropic.NotFoundError),
        ({"extra_body": {"temperature": -1}}, anthropic.BadRequestError),
    ):
        try:
            client.messages.create(
                **{"model": MODEL, "max_tokens": 9, "messages": MESSAGES, **change}
            )
        except kind as error:
            assert error.body["type"] == "error" and error.body["error"]["message"]
        else:
            raise AssertionError("no error")


def models():
    assert MODEL in [each.id for each in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


run(
    create,
    stream_helper,
    raw_events,
    tools_twice_around,
    tools_streamed,
    tool_runner,
    structured_output,
    count_tokens,
    errors_have_their_types,
    models,
)
