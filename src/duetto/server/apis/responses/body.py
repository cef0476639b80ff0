"""The body of /v1/responses, as strict structs (https://platform.openai.com/docs/api-reference,
https://www.openresponses.org).

What is not here (built-in tools, files, images) is refused by its name, or declared beside it with
the values that change nothing. Knows no tokens and no engine.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct

from duetto.server.apis.accepted import ABSENT, Only
from duetto.server.apis.protocol import MAX_MESSAGES, MAX_TOOLS, Label, ServiceTier
from duetto.server.apis.structured import Schema

ItemRole = Literal["user", "assistant", "system", "developer"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class TextContent(Struct, forbid_unknown_fields=True):
    """A part of a message or of reasoning: `output_text` is how an answer comes back."""

    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: str = ""
    refusal: str | None = None
    annotations: Raw = ABSENT
    logprobs: Raw = ABSENT
    prompt_cache_breakpoint: Raw = ABSENT


class InputItem(Struct, forbid_unknown_fields=True):
    """One item of `input`; which fields it has depends on its type, and is checked when it is read.

    Clients leave the type of messages out, so it cannot be a tag.
    """

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: ItemRole | None = None
    content: str | Annotated[list[TextContent], Meta(max_length=MAX_MESSAGES)] | None = None
    name: str | None = None
    call_id: str | None = None
    arguments: str | None = None
    output: str | Annotated[list[TextContent], Meta(max_length=MAX_MESSAGES)] | None = None
    summary: Annotated[list[TextContent], Meta(max_length=MAX_MESSAGES)] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: ItemStatus | None = None
    phase: Raw = ABSENT


class FunctionTool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    defer_loading: Annotated[Raw, Only(False)] = ABSENT


class NamedFunctionTool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str


class TextFormat(Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: Schema | None = None
    description: str | None = None
    strict: bool | None = None


class OutputText(Struct, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: Annotated[Raw, Only("medium")] = ABSENT


class ReasoningOptions(Struct, forbid_unknown_fields=True):
    effort: str | None = None
    summary: Annotated[Raw, Only("auto", "none")] = ABSENT  # reasoning is shown as it is
    generate_summary: Annotated[Raw, Only()] = ABSENT


class ResponseStreamOptions(Struct, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None  # whether OpenAI may pad events; nothing here does


class ResponsesRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    model: str
    input: str | Annotated[list[InputItem], Meta(max_length=MAX_MESSAGES)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    text: OutputText | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    include: list[str] | None = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    truncation: Literal["disabled"] | None = None  # nothing is cut from a conversation
    service_tier: ServiceTier | None = None
    user: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    client_metadata: Raw = ABSENT  # for the caller's own books, as metadata
    prompt_cache_retention: Label = None
    prompt_cache_options: Raw = ABSENT
    background: Annotated[Raw, Only(False)] = ABSENT
    conversation: Annotated[Raw, Only()] = ABSENT
    prompt: Annotated[Raw, Only()] = ABSENT
    max_tool_calls: Raw = ABSENT  # of built-in tools, of which there are none
    context_management: Annotated[Raw, Only([])] = ABSENT
    moderation: Annotated[Raw, Only()] = ABSENT
    # Ours, as in /v1/chat/completions.
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    thinking_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
