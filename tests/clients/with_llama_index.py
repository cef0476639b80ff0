"""llama-index-llms-openai-like: chat, streams, tools, structured output."""

from checks import MODEL, QUESTION, URL, needs, run

needs("llama-index-llms-openai-like", "llama_index.llms.openai_like")
from llama_index.core.llms import ChatMessage  # noqa: E402
from llama_index.core.tools import FunctionTool  # noqa: E402
from llama_index.llms.openai_like import OpenAILike  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402

model = OpenAILike(
    model=MODEL,
    api_base=URL + "/v1",
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    should_use_structured_outputs=True,
    context_window=2048,
    max_tokens=200,
    max_retries=0,
)
MESSAGES = [ChatMessage(role="user", content=QUESTION)]


class Weather(BaseModel):
    """What the weather is."""

    city: str = Field(max_length=12)
    rains: bool


def is_raining(today: bool) -> str:
    """Whether it rains."""
    return f"no {today}"


def text_and_its_stream():
    assert model.chat(MESSAGES).message.role == "assistant"
    assert list(model.stream_chat(MESSAGES)) and model.complete(QUESTION) is not None


def tools():
    tool = FunctionTool.from_defaults(is_raining)
    got = model.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    (call, *_) = model.get_tool_calls_from_response(got)
    assert call.tool_name == "is_raining"
    more = {"tool_call_id": call.tool_id}
    result = ChatMessage(role="tool", content="no", additional_kwargs=more)
    model.chat_with_tools([tool], chat_history=[*MESSAGES, got.message, result])


def tools_streamed():
    tool = FunctionTool.from_defaults(is_raining)
    *_, last = model.stream_chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    assert model.get_tool_calls_from_response(last)


def structured_output():
    assert isinstance(model.as_structured_llm(Weather).chat(MESSAGES).raw, Weather)


run(text_and_its_stream, tools, tools_streamed, structured_output)
