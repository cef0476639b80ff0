"""The bodies of /v1/messages, as strict structs (https://docs.anthropic.com/en/api/messages).

What is not here is declared beside it with the values that change nothing, or is refused by its
name. Knows no tokens and no engine.
"""

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Raw, Struct

from duetto.server.apis.accepted import ABSENT, Only
from duetto.server.apis.protocol import MAX_MESSAGES, MAX_TOOLS
from duetto.server.apis.structured import Schema

# What Claude Code sends; nothing is cleared from a conversation here.
_KEEPS_ALL = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
MAX_EXAMPLES = 64  # of a tool


class TextBlock(Struct, forbid_unknown_fields=True, tag="text"):
    text: str
    cache_control: Raw = ABSENT  # the prefix cache needs no marks
    citations: Annotated[Raw, Only([])] = ABSENT


class ToolUseBlock(Struct, forbid_unknown_fields=True, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    cache_control: Raw = ABSENT
    caller: Raw = ABSENT


class ToolResultBlock(Struct, forbid_unknown_fields=True, tag="tool_result"):
    tool_use_id: str
    content: str | Annotated[list[TextBlock], Meta(max_length=MAX_MESSAGES)] = ""
    is_error: bool | None = None
    cache_control: Raw = ABSENT


class ThinkingBlock(Struct, forbid_unknown_fields=True, tag="thinking"):
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Struct, forbid_unknown_fields=True, tag="redacted_thinking"):
    data: str = ""


Block = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock
Blocks = Annotated[list[Block], Meta(max_length=MAX_MESSAGES)]


TurnRole = Literal["user", "assistant", "system"]


class TurnMessage(Struct, forbid_unknown_fields=True):
    role: TurnRole
    content: str | Blocks


class InputTool(Struct, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Raw = ABSENT
    input_examples: Annotated[list[dict[str, Any]], Meta(max_length=MAX_EXAMPLES)] | None = None
    eager_input_streaming: Raw = ABSENT
    defer_loading: Annotated[Raw, Only(False)] = ABSENT
    allowed_callers: Annotated[Raw, Only(["direct"])] = ABSENT


class ToolUse(Struct, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingOptions(Struct, forbid_unknown_fields=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Struct, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: Schema
    name: str | None = None


class OutputConfig(Struct, forbid_unknown_fields=True):
    format: OutputFormat | None = None
    effort: str | None = None


class PromptRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """What a prompt is made of."""

    model: str
    messages: Annotated[list[TurnMessage], Meta(max_length=MAX_MESSAGES)]
    system: str | Annotated[list[TextBlock], Meta(max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[InputTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolUse | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    cache_control: Raw = ABSENT
    speed: Annotated[Raw, Only("standard")] = ABSENT
    mcp_servers: Annotated[Raw, Only([])] = ABSENT
    container: Annotated[Raw, Only()] = ABSENT
    context_management: Annotated[Raw, Only({"edits": []}, {}, _KEEPS_ALL)] = ABSENT
    betas: Raw = ABSENT  # what a client would like to try; each thing has a field of its own


class MessagesRequest(PromptRequest, kw_only=True):
    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: dict[str, Any] | None = None  # user_id: for the caller's own books
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: Raw = ABSENT
    thread: Annotated[Raw, Only()] = ABSENT
    # Ours, as in /v1/chat/completions.
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CountRequest(PromptRequest, kw_only=True):
    """All of /v1/messages/count_tokens."""

    ELSEWHERE: ClassVar[dict[str, type]] = {"/v1/messages": MessagesRequest}
