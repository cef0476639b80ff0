"""The prompts of a completion, in any of the shapes that the field takes. Knows no tokens."""

from duetto.core.config import SchedulerConfig
from duetto.engine.segments import PromptSegment
from duetto.server.apis.protocol import SegmentedPrompt, WireSegment
from duetto.server.http.errors import invalid, refused

GivenPrompt = str | list[int] | tuple[PromptSegment, ...]
AnyPrompts = str | SegmentedPrompt | list[str | int | list[int] | SegmentedPrompt]


def split_prompts(
    prompt: AnyPrompts, config: SchedulerConfig, max_answers: int, *, is_truncated: bool = False
) -> list[GivenPrompt]:
    """A prompt field's shapes as a list of prompts. Raises ApiError 400 for a mixture, or for
    more entries than a context or a reply holds, before each is looked at. `is_truncated`: a
    longer one is cut later."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, SegmentedPrompt):
        return [segments_of(prompt, "prompt")]
    if not prompt:
        raise invalid("prompt", "must hold at least one prompt or token id")
    if isinstance(prompt[0], int):
        if len(prompt) > config.context_length and not is_truncated:
            raise refused(config.too_long(len(prompt), 1), {})
    elif len(prompt) > max_answers:
        raise invalid("prompt", f"{len(prompt)} prompts; at most {max_answers} answers per request")
    texts = [p for p in prompt if isinstance(p, str)]
    token_ids = [p for p in prompt if isinstance(p, int)]
    id_lists = [p for p in prompt if isinstance(p, list)]
    segmented = [p for p in prompt if isinstance(p, SegmentedPrompt)]
    if len(token_ids) == len(prompt):
        return [token_ids]
    if len(texts) == len(prompt):
        return [*texts]
    if len(id_lists) == len(prompt):
        return [*id_lists]
    if len(segmented) == len(prompt):
        return [segments_of(p, f"prompt[{index}]") for index, p in enumerate(segmented)]
    raise invalid(
        "prompt",
        "must be a text, texts, token ids, lists of token ids or objects with segments, "
        "not a mixture",
    )


def segments_of(prompt: SegmentedPrompt, field: str) -> tuple[PromptSegment, ...]:
    """Raises ApiError 400, naming the one that is none."""
    if not prompt.segments:
        raise invalid(f"{field}.segments", "must hold at least one segment")
    found = [_segment(s, f"{field}.segments[{i}]") for i, s in enumerate(prompt.segments)]
    return tuple(found)


def _segment(segment: str | list[int] | WireSegment, field: str) -> PromptSegment:
    if not isinstance(segment, WireSegment):
        return PromptSegment(segment)
    content = segment.token_ids if segment.text is None else segment.text
    if content is None or (segment.text is not None and segment.token_ids is not None):
        raise invalid(field, "must have exactly one of text and token_ids")
    return PromptSegment(content, bool(segment.reusable))
