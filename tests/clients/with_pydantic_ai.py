"""pydantic-ai: tools and output types, over chat completions, Responses and Messages."""

from checks import MODEL, QUESTION, URL, needs, run

needs("pydantic-ai-slim", "pydantic_ai")
from typing import Literal  # noqa: E402

from pydantic import BaseModel  # noqa: E402
from pydantic_ai import Agent, NativeOutput, ToolOutput, capture_run_messages  # noqa: E402
from pydantic_ai.exceptions import UsageLimitExceeded  # noqa: E402
from pydantic_ai.models.anthropic import AnthropicModel  # noqa: E402
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel  # noqa: E402
from pydantic_ai.providers.anthropic import AnthropicProvider  # noqa: E402
from pydantic_ai.providers.openai import OpenAIProvider  # noqa: E402
from pydantic_ai.usage import UsageLimits  # noqa: E402

openai = OpenAIProvider(base_url=URL + "/v1", api_key="none")
SETTINGS = {"max_tokens": 200}
MODELS = [
    OpenAIChatModel(MODEL, provider=openai),
    OpenAIResponsesModel(MODEL, provider=openai),
    AnthropicModel(MODEL, provider=AnthropicProvider(base_url=URL, api_key="none")),
]


class Weather(BaseModel):
    city: Literal["Riga", "Oslo"]  # the client drops the lengths of texts from strict tools
    rains: bool


def texts():
    for model in MODELS:
        agent = Agent(model, instructions="Be short.", model_settings=SETTINGS, retries=3)
        got = agent.run_sync(QUESTION)
        assert got.output and got.usage.output_tokens, model
        again = agent.run_sync("And in Oslo?", message_history=got.all_messages())
        assert again.output, model


def native_output():
    for model in MODELS[:2]:
        agent = Agent(model, output_type=NativeOutput(Weather), model_settings=SETTINGS)
        assert isinstance(agent.run_sync(QUESTION).output, Weather), model


def tool_output():
    """Output tools are required, so they are called by grammar."""
    for model in MODELS:
        agent = Agent(model, output_type=ToolOutput(Weather, strict=True), model_settings=SETTINGS)
        assert isinstance(agent.run_sync(QUESTION).output, Weather), model


def tools_that_run():
    """Which of the two a small model calls is its own affair: one result has to come back."""
    for model in MODELS:
        output = ToolOutput(Weather, strict=True)
        agent = Agent(model, output_type=output, model_settings=SETTINGS, retries=5)

        @agent.tool_plain(strict=True)
        def is_raining(today: bool) -> str:
            """Whether it rains."""
            return f"no {today}"

        with capture_run_messages() as messages:
            try:
                got = agent.run_sync(QUESTION, usage_limits=UsageLimits(request_limit=4))
                assert isinstance(got.output, Weather), model
            except UsageLimitExceeded:
                assert len(messages) > 4, model


def streams():
    for model in MODELS[:2]:
        agent = Agent(model, output_type=NativeOutput(Weather), model_settings=SETTINGS)
        got = agent.run_stream_sync(QUESTION)
        assert isinstance(got.get_output(), Weather), model


run(texts, native_output, tool_output, tools_that_run, streams)
