"""The bodies that clients send, as strict structs. Knows no tokens and no engine.

What a field that cannot be honoured may hold is declared beside it (accepted.py). Ranges of what is
honoured are SamplingParams' to check.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct

from duetto.server.apis.accepted import ABSENT, Only
from duetto.server.apis.structured import ResponseFormat, Schema, StructuredOutputs

Role = Literal["system", "developer", "user", "assistant", "tool"]
ServiceTier = Literal["auto", "default"]
Label = str | None  # for the caller's own books; by definition it changes nothing
MAX_MESSAGES = 5000  # and parts of one; beyond, a body costs more to read than a model would take
MAX_TOOLS = 512
MAX_DETOKENIZED = 2**18


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # whether OpenAI may pad chunks; nothing here does


class Features(Struct, forbid_unknown_fields=True, kw_only=True):
    """What this version does not have. The first that is asked for is the one that is named, so
    what others depend on comes first."""

    tools: Annotated[Raw, Only([])] = ABSENT
    functions: Annotated[Raw, Only([])] = ABSENT
    tool_choice: Annotated[Raw, Only("none", "auto")] = ABSENT  # alike where there are no tools
    function_call: Annotated[Raw, Only("none", "auto")] = ABSENT
    parallel_tool_calls: Annotated[Raw, Only(True, False)] = ABSENT
    audio: Annotated[Raw, Only()] = ABSENT
    modalities: Annotated[Raw, Only(["text"])] = ABSENT
    web_search_options: Annotated[Raw, Only()] = ABSENT
    prediction: Annotated[Raw, Only()] = ABSENT
    moderation: Annotated[Raw, Only()] = ABSENT
    documents: Annotated[Raw, Only([])] = ABSENT
    chat_template: Annotated[Raw, Only()] = ABSENT
    continue_final_message: Annotated[Raw, Only(False)] = ABSENT
    verbosity: Annotated[Raw, Only("medium")] = ABSENT
    reasoning: Annotated[Raw, Only({})] = ABSENT
    include_reasoning: Annotated[Raw, Only(True)] = ABSENT
    thinking_token_budget: Annotated[Raw, Only(-1)] = ABSENT  # vLLM's name
    thinking_budget: Annotated[Raw, Only()] = ABSENT
    use_beam_search: Annotated[Raw, Only(False)] = ABSENT
    length_penalty: Annotated[Raw, Only(1)] = ABSENT
    early_stopping: Annotated[Raw, Only(False)] = ABSENT
    prompt_embeds: Annotated[Raw, Only([], "")] = ABSENT
    truncate_prompt_tokens: Annotated[Raw, Only()] = ABSENT
    mm_processor_kwargs: Annotated[Raw, Only({})] = ABSENT
    media_io_kwargs: Annotated[Raw, Only({})] = ABSENT
    kv_transfer_params: Annotated[Raw, Only({})] = ABSENT
    ec_transfer_params: Annotated[Raw, Only({})] = ABSENT
    vllm_xargs: Annotated[Raw, Only({})] = ABSENT
    extra_body: Annotated[Raw, Only({})] = ABSENT  # of a client that put it into the body
    logits_processors: Annotated[Raw, Only([])] = ABSENT
    logprob_token_ids: Annotated[Raw, Only()] = ABSENT
    repetition_detection: Annotated[Raw, Only()] = ABSENT
    watermarking: Annotated[Raw, Only(False)] = ABSENT
    stream_interval: Annotated[Raw, Only(1)] = ABSENT
    detokenize: Annotated[Raw, Only(True)] = ABSENT
    spaces_between_special_tokens: Annotated[Raw, Only(True)] = ABSENT
    return_tokens_as_token_ids: Annotated[Raw, Only(False)] = ABSENT
    return_prompt_text: Annotated[Raw, Only(False)] = ABSENT
    return_token_offsets: Annotated[Raw, Only(False)] = ABSENT
    routed_experts_prompt_start: Annotated[Raw, Only(0)] = ABSENT
    return_mm_kwargs: Raw = ABSENT  # there is nothing that they could be returned of
    truncation_side: Annotated[Raw, Only("left")] = ABSENT  # the side that is cut off
    guided_decoding_backend: Raw = ABSENT


class OtherSamplers(Features, kw_only=True):
    """What llama.cpp and its clients call the samplers that are not here, at rest."""

    typical_p: Annotated[Raw, Only(1)] = ABSENT
    tfs_z: Annotated[Raw, Only(1)] = ABSENT
    top_a: Annotated[Raw, Only(0)] = ABSENT
    typ_p: Annotated[Raw, Only(1)] = ABSENT
    typical: Annotated[Raw, Only(1)] = ABSENT
    tfs: Annotated[Raw, Only(1)] = ABSENT
    top_n_sigma: Annotated[Raw, Only(-1)] = ABSENT
    mirostat: Annotated[Raw, Only(0)] = ABSENT
    mirostat_mode: Annotated[Raw, Only(0)] = ABSENT
    dynatemp_range: Annotated[Raw, Only(0)] = ABSENT
    xtc_probability: Annotated[Raw, Only(0)] = ABSENT
    dry_multiplier: Annotated[Raw, Only(0)] = ABSENT
    smoothing_factor: Annotated[Raw, Only(0)] = ABSENT
    repeat_penalty: Annotated[Raw, Only(1)] = ABSENT  # repetition_penalty here
    n_probs: Annotated[Raw, Only(0)] = ABSENT
    n_keep: Annotated[Raw, Only(0, -1)] = ABSENT
    n_predict: Annotated[Raw, Only(-1)] = ABSENT  # max_tokens here
    n_indent: Annotated[Raw, Only(0)] = ABSENT
    sampler_seed: Annotated[Raw, Only(-1)] = ABSENT  # seed here
    ban_eos_token: Annotated[Raw, Only(False)] = ABSENT
    custom_token_bans: Annotated[Raw, Only("")] = ABSENT
    banned_strings: Annotated[Raw, Only([])] = ABSENT
    stopping_strings: Annotated[Raw, Only([])] = ABSENT
    samplers: Annotated[Raw, Only([])] = ABSENT
    backend_sampling: Annotated[Raw, Only(False)] = ABSENT
    reasoning_format: Annotated[Raw, Only("none")] = ABSENT  # text is returned as it is
    id_slot: Annotated[Raw, Only(-1)] = ABSENT
    lora: Annotated[Raw, Only([])] = ABSENT
    return_progress: Annotated[Raw, Only(False)] = ABSENT
    timings_per_token: Annotated[Raw, Only(False)] = ABSENT
    post_sampling_probs: Annotated[Raw, Only(False)] = ABSENT
    # Without their sampler, these change nothing.
    mirostat_tau: Raw = ABSENT
    mirostat_eta: Raw = ABSENT
    dynatemp_exponent: Raw = ABSENT
    xtc_threshold: Raw = ABSENT
    dry_base: Raw = ABSENT
    dry_allowed_length: Raw = ABSENT
    dry_penalty_last_n: Raw = ABSENT
    dry_sequence_breakers: Raw = ABSENT
    repeat_last_n: Raw = ABSENT
    cache_prompt: Raw = ABSENT  # an answer is the same with a cache and without


class OtherServers(OtherSamplers, kw_only=True):
    """What clients of SGLang, Ollama and hosted services send, where it asks for nothing."""

    no_stop_trim: Annotated[Raw, Only(False)] = ABSENT
    return_hidden_states: Annotated[Raw, Only(False)] = ABSENT
    lora_path: Annotated[Raw, Only()] = ABSENT
    separate_reasoning: Annotated[Raw, Only(False)] = ABSENT
    stream_reasoning: Raw = ABSENT  # of what is not separate
    rid: Raw = ABSENT  # a label
    keep_alive: Raw = ABSENT  # the model stays loaded
    options: Annotated[Raw, Only({})] = ABSENT
    background: Annotated[Raw, Only(False)] = ABSENT
    deferred: Annotated[Raw, Only(False)] = ABSENT
    enable_search: Annotated[Raw, Only(False)] = ABSENT
    raw_output: Annotated[Raw, Only(False)] = ABSENT
    context_length_exceeded_behavior: Annotated[Raw, Only("error")] = ABSENT
    transforms: Annotated[Raw, Only([])] = ABSENT
    plugins: Annotated[Raw, Only([])] = ABSENT
    models: Annotated[Raw, Only([])] = ABSENT
    route: Annotated[Raw, Only()] = ABSENT
    provider: Annotated[Raw, Only({})] = ABSENT
    safe_prompt: Annotated[Raw, Only(False)] = ABSENT
    random_seed: Annotated[Raw, Only()] = ABSENT


class WireSegment(Struct, forbid_unknown_fields=True):
    """A text or token ids, and whether its KV may be reused wherever it stands."""

    text: str | None = None
    token_ids: list[int] | None = None
    reusable: bool | None = None


class SegmentedPrompt(Struct, forbid_unknown_fields=True):
    segments: Annotated[list[str | list[int] | WireSegment], Meta(max_length=MAX_MESSAGES)]


class SamplingRequest(OtherServers, kw_only=True):
    """What both endpoints that sample have in common; the names are OpenAI's, then vLLM's."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # type: ignore[assignment]  # others refuse it
    truncate_prompt_tokens: int | None = None  # type: ignore[assignment]  # others refuse it
    cache_salt: str | None = None
    reuse: bool | str | dict[str, Any] | None = None  # core/reuse_choice.py reads it
    priority: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    grammar: str | None = None
    json_schema: Schema | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    service_tier: ServiceTier | None = None
    store: bool | None = None
    user: Label = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    prompt_cache_retention: Label = None
    prompt_cache_options: Raw = ABSENT
    request_id: Label = None
    session_id: Label = None
    chat_id: Label = None
    conversation_id: Label = None
    trace_id: Label = None


class CompletionRequest(SamplingRequest, kw_only=True):
    prompt: str | SegmentedPrompt | list[str | int | list[int] | SegmentedPrompt]
    echo: bool | None = None
    logprobs: int | bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    top_logprobs: Annotated[Raw, Only(0)] = ABSENT
    add_generation_prompt: Annotated[Raw, Only(True)] = ABSENT
    chat_template_kwargs: Annotated[Raw, Only({})] = ABSENT
    max_completion_tokens: Annotated[Raw, Only()] = ABSENT
    reasoning_effort: Annotated[Raw, Only("none", "medium")] = ABSENT  # is for a chat's template

    def __post_init__(self) -> None:
        if self.logprobs is False:  # as chats say that they want none; true is refused later
            self.logprobs = None


class TextPart(Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str
    cache: Literal["reusable"] | None = None
    cache_control: Raw = ABSENT
    prompt_cache_breakpoint: Raw = ABSENT
    id: Raw = ABSENT
    index: Raw = ABSENT
    logprobs: Annotated[Raw, Only([])] = ABSENT
    annotations: Annotated[Raw, Only([])] = ABSENT
    # What parts of other types hold, and some clients write as null into each.
    image_url: Annotated[Raw, Only()] = ABSENT
    input_audio: Annotated[Raw, Only()] = ABSENT
    audio_url: Annotated[Raw, Only()] = ABSENT
    video_url: Annotated[Raw, Only()] = ABSENT
    file: Annotated[Raw, Only()] = ABSENT
    refusal: Annotated[Raw, Only("")] = ABSENT

    def shown(self) -> dict[str, str]:
        marked = {} if self.cache is None else {"cache": self.cache}
        return {"type": self.type, "text": self.text, **marked}


class CalledFunction(Struct, forbid_unknown_fields=True):
    name: str
    arguments: str  # JSON, as the model wrote it


class ToolCall(Struct, forbid_unknown_fields=True):
    """A call that an assistant's message made."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"
    index: Raw = ABSENT  # of streams; the order says it
    provider_specific_fields: Raw = ABSENT
    extra_content: Raw = ABSENT

    def shown(self) -> dict[str, Any]:
        called = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": called}


class Function(Struct, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function
    cache_control: Raw = ABSENT

    def shown(self) -> dict[str, Any]:
        """What a chat template is given."""
        given = {
            "name": self.function.name,
            "description": self.function.description,
            "parameters": self.function.parameters,
        }
        named = {name: value for name, value in given.items() if value is not None}
        return {"type": self.type, "function": named}


class NamedFunction(Struct, forbid_unknown_fields=True):
    name: str


class NamedTool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: NamedFunction


class Message(Struct, forbid_unknown_fields=True):
    role: Role
    content: str | Annotated[list[TextPart], Meta(max_length=MAX_MESSAGES)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_MESSAGES)] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    # What clients write into an assistant's message that is sent back.
    function_call: Annotated[Raw, Only()] = ABSENT
    audio: Annotated[Raw, Only()] = ABSENT
    images: Annotated[Raw, Only([])] = ABSENT
    annotations: Annotated[Raw, Only([])] = ABSENT
    refusal: Annotated[Raw, Only("")] = ABSENT
    reasoning_details: Annotated[Raw, Only([])] = ABSENT
    thinking_blocks: Annotated[Raw, Only([])] = ABSENT
    parsed: Annotated[Raw, Only()] = ABSENT
    prefix: Annotated[Raw, Only(False)] = ABSENT
    partial: Annotated[Raw, Only(False)] = ABSENT
    attachments: Annotated[Raw, Only([])] = ABSENT
    files: Annotated[Raw, Only([])] = ABSENT
    additional_kwargs: Annotated[Raw, Only({})] = ABSENT
    id: Raw = ABSENT
    model: Raw = ABSENT  # that said it
    timestamp: Raw = ABSENT
    created_at: Raw = ABSENT
    metadata: Raw = ABSENT
    cache_control: Raw = ABSENT
    provider_specific_fields: Raw = ABSENT

    def shown(self) -> dict[str, Any]:
        """What a chat template is given, and marks: what changes nothing is not there."""
        content: str | list[dict[str, str]] | None = (
            [part.shown() for part in self.content]
            if isinstance(self.content, list)
            else self.content
        )
        more = {
            "name": self.name,
            "tool_calls": [call.shown() for call in self.tool_calls or ()] or None,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content or self.reasoning or None,
        }
        given = {name: value for name, value in more.items() if value is not None}
        return {"role": self.role, "content": content, **given}

    @property
    def text(self) -> str:
        """Its content as one text; parts are joined as for a template that takes strings."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


Messages = Annotated[list[Message], Meta(max_length=MAX_MESSAGES)]
Documents = Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES)]


Tools = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]


class ChatRequest(SamplingRequest, kw_only=True):
    messages: Messages
    tools: Tools | None = None  # type: ignore[assignment]  # which completions refuse
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None  # type: ignore[assignment]
    parallel_tool_calls: bool | None = None  # type: ignore[assignment]
    include_reasoning: bool | None = None  # type: ignore[assignment]
    documents: Documents | None = None  # type: ignore[assignment]  # which completions refuse
    max_completion_tokens: int | None = None
    thinking_budget: int | None = None  # type: ignore[assignment]  # as documents
    thinking_token_budget: int | None = None  # type: ignore[assignment]  # -1: none
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None  # type: ignore[assignment]  # as documents
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    echo: bool | None = None  # the answer begins with the assistant's message that is the last one
    suffix: Annotated[Raw, Only("")] = ABSENT
    best_of: Annotated[Raw, Only(1)] = ABSENT


class TokenizeRequest(Features, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None  # type: ignore[assignment]  # which completions refuse
    documents: Documents | None = None  # type: ignore[assignment]  # which completions refuse
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None  # type: ignore[assignment]  # as documents
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    user: Label = None


class DetokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    tokens: Annotated[list[int], Meta(max_length=MAX_DETOKENIZED)]
    model: str | None = None
    user: Label = None
