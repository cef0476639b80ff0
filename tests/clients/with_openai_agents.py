"""openai-agents, on Responses and on chat completions: tools, output types, hand-offs, streams."""

import asyncio

from checks import MODEL, QUESTION, needs, run

needs("openai-agents", "agents")
from agents import (  # noqa: E402
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402

set_tracing_disabled(disabled=True)
CLIENTS: list[AsyncOpenAI] = []


class Weather(BaseModel):
    city: str = Field(max_length=12)
    rains: bool


@function_tool
def is_raining(today: bool) -> str:
    """Whether it rains."""
    return f"no {today}"


def agents(**more):
    """One for each API."""
    settings = ModelSettings(max_tokens=200, **more.pop("settings", {}))
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        CLIENTS.append(AsyncOpenAI(max_retries=0))
        model = kind(model=MODEL, openai_client=CLIENTS[-1])
        yield Agent(
            name="one", instructions="Be short.", model=model, model_settings=settings, **more
        )


async def go(agent, asked=QUESTION, **more):
    return await Runner.run(agent, asked, **more)


async def _texts():
    for agent in agents():
        first = await go(agent)
        assert first.final_output
        again = [*first.to_input_list(), {"role": "user", "content": "And in Oslo?"}]
        assert (await go(agent, again)).final_output


async def _output_types():
    for agent in agents(output_type=Weather):
        assert isinstance((await go(agent)).final_output, Weather)


async def _tools():
    for agent in agents(tools=[is_raining], settings={"tool_choice": "required"}):
        kinds = [type(item).__name__ for item in (await go(agent)).new_items]
        assert "ToolCallOutputItem" in kinds, kinds


async def _tools_streamed():
    for agent in agents(tools=[is_raining], settings={"tool_choice": "required"}):
        got = Runner.run_streamed(agent, QUESTION)
        names = [event.name async for event in got.stream_events() if hasattr(event, "name")]
        assert {"tool_called", "tool_output"} <= set(names), names


async def _handoffs():
    for agent in agents(settings={"tool_choice": "required"}):
        few = ModelSettings(max_tokens=50)
        agent.handoffs = [Agent(name="other", model=agent.model, model_settings=few)]
        assert (await go(agent, max_turns=4)).last_agent.name == "other"


async def _stored_conversations():
    agent = next(agents())
    first = await go(agent)
    more = {"previous_response_id": first.last_response_id}
    assert (await go(agent, "And in Oslo?", **more)).final_output


def in_a_loop(check):
    """Its clients live in the loop that they were first used in."""

    async def and_close():
        try:
            await check()
        finally:
            while CLIENTS:
                await CLIENTS.pop().close()

    def named():
        asyncio.run(and_close())

    named.__name__ = check.__name__.lstrip("_")
    return named


CHECKS = (_texts, _output_types, _tools, _tools_streamed, _handoffs, _stored_conversations)
run(*[in_a_loop(check) for check in CHECKS])
