"""Reasoning that stands at the beginning of an answer, between two markers.

Sources: the chat templates of the families, and vLLM's documentation of reasoning outputs for the
names. A template may have opened the block already, at the end of the prompt (`is_open`).
"""

from dataclasses import dataclass

from duetto.dialects.pieces import Reasoning
from duetto.dialects.reader import SPACE, Reader, Reading
from duetto.dialects.words import Markers, Words


@dataclass(frozen=True)
class ReasoningDialect:
    """How one family of models marks its reasoning."""

    name: str
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    aliases: tuple[str, ...] = ()  # other names that `--reasoning-parser` takes
    is_always_open: bool = False  # an answer begins within reasoning, whether or not it says so

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.openings, *self.closings)

    def is_open(self, prompt: str) -> bool:
        """Whether an answer to this prompt, as the template has rendered it, begins within."""
        return self.is_always_open or prompt.rstrip(SPACE).endswith(self.openings)

    def steps(self, reader: Reader, *, is_open: bool) -> Reading[None]:
        """Read the reasoning, if there is any; not what is behind it."""
        yield from reader.spaces()
        opening = yield from reader.literal(Words(self.openings))
        if opening is None and not (is_open or self.is_always_open):
            reader.reread()
            return
        yield from reader.marker_ends()
        yield from reader.text_until(Markers(*self.closings), Reasoning)
        yield from reader.marker_ends()


THINK = ReasoningDialect(
    name="think",
    openings=("<think>",),
    closings=("</think>",),
    aliases=(
        "qwen3",
        "deepseek_v3",
        "deepseek_v4",
        "glm45",
        "glm47",
        "holo2",
        "kimi_k2",
        "mimo",
        "minimax_m2",
        "nemotron_v3",
        "olmo3",
        "step3p5",
    ),
)
# DeepSeek R1 and its distillates reason in each answer; older templates leave the marker out.
DEEPSEEK_R1 = ReasoningDialect(
    name="deepseek_r1",
    openings=("<think>",),
    closings=("</think>",),
    aliases=("step3",),
    is_always_open=True,
)
MISTRAL_REASONING = ReasoningDialect(name="mistral", openings=("[THINK]",), closings=("[/THINK]",))
SEED_REASONING = ReasoningDialect(
    name="seed_oss", openings=("<seed:think>",), closings=("</seed:think>",)
)
GEMMA_REASONING = ReasoningDialect(
    name="gemma4", openings=("<|channel>thought",), closings=("<channel|>",)
)
GRANITE_REASONING = ReasoningDialect(
    name="granite",
    openings=("Here is my thought process:", "Here's my thought process:"),
    closings=("Here is my response:", "Here's my response:"),
)
# Its markers are read by the dialect of its calls, `openai`: one format has both.
HARMONY_REASONING = ReasoningDialect(
    name="openai_gptoss",
    openings=("<|channel|>analysis<|message|>",),
    closings=("<|end|>",),
    aliases=("harmony", "openai"),
)

REASONING_DIALECTS = (
    THINK,
    DEEPSEEK_R1,
    MISTRAL_REASONING,
    SEED_REASONING,
    GEMMA_REASONING,
    GRANITE_REASONING,
    HARMONY_REASONING,
)
