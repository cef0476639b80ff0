"""Filling in the middle: the tokens that models of code are trained with, and prompts of them.

    prefix first   <prefix> text before <suffix> text behind <middle>
    suffix first   <suffix> text behind <prefix> text before <middle>

The answer is the text between the two. A caller's text is a text, whatever markers it spells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from duetto.core.text import TextCodec

NO_TOKENS = (
    "this model's tokenizer has no tokens for filling in the middle, such as <|fim_prefix|>, "
    "<fim_prefix> or [PREFIX]"
)
PROJECT, FILE = "myproject", "filename"  # what llama.cpp calls them, which nobody is asked for
SNIPPET = "\n\n--- snippet ---\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class InfillFamily:
    """How a family of models spells its tokens."""

    prefix: str
    suffix: str
    middle: str | None
    suffix_first: bool = False
    repo: str | None = None  # begins a repository, followed by its name
    file: str | None = None  # begins another file, followed by its name
    ends: tuple[str, ...] = ()  # beside the model's own end of sequence, and all of these


FAMILIES = (
    InfillFamily(  # Qwen 2.5 Coder and Qwen 3 Coder, CodeGemma, Granite 4
        prefix="<|fim_prefix|>",
        suffix="<|fim_suffix|>",
        middle="<|fim_middle|>",
        repo="<|repo_name|>",
        file="<|file_sep|>",
        ends=("<|fim_pad|>", "<|endoftext|>", "<|im_end|>", "<|file_separator|>"),
    ),
    InfillFamily(  # StarCoder, Granite, Stable Code, Refact
        prefix="<fim_prefix>",
        suffix="<fim_suffix>",
        middle="<fim_middle>",
        repo="<repo_name>",
        file="<file_sep>",
        ends=("<fim_pad>", "<|endoftext|>", "<filename>", "<reponame>"),
    ),
    InfillFamily(  # SantaCoder
        prefix="<fim-prefix>",
        suffix="<fim-suffix>",
        middle="<fim-middle>",
        ends=("<fim-pad>", "<|endoftext|>"),
    ),
    InfillFamily(  # Code Llama
        prefix="▁<PRE>", suffix="▁<SUF>", middle="▁<MID>", ends=("▁<EOT>",)
    ),
    InfillFamily(  # DeepSeek Coder
        prefix="<｜fim▁begin｜>",  # these are its bars
        suffix="<｜fim▁hole｜>",
        middle="<｜fim▁end｜>",
        ends=("<|EOT|>",),
    ),
    InfillFamily(  # Codestral
        prefix="[PREFIX]", suffix="[SUFFIX]", middle=None, suffix_first=True, ends=("[MIDDLE]",)
    ),
    InfillFamily(  # Seed-Coder
        prefix="<[fim-prefix]>",
        suffix="<[fim-suffix]>",
        middle="<[fim-middle]>",
        suffix_first=True,
    ),
    InfillFamily(  # GLM 4
        prefix="<|code_prefix|>",
        suffix="<|code_suffix|>",
        middle="<|code_middle|>",
        ends=("<|endoftext|>", "<|user|>"),
    ),
)


class ExtraFile(NamedTuple):
    """Another file, which the model is shown before the one that has a hole."""

    name: str
    text: str


class Infill:
    """The tokens of one model."""

    def __init__(self, codec: TextCodec, family: InfillFamily) -> None:
        self._codec = codec
        self._family = family
        names = (family.prefix, family.suffix, family.middle, family.repo, family.file)
        spelled = [name for name in (*names, *family.ends) if name is not None]
        found = {name: codec.token_id(name) for name in spelled}
        self._ids = {name: token_id for name, token_id in found.items() if token_id is not None}
        self.end_token_ids = frozenset(self._ids.values())

    @staticmethod
    def of(codec: TextCodec) -> "Infill | None":
        """None where the tokenizer has no such tokens."""
        for family in FAMILIES:
            needed = (family.prefix, family.suffix, family.middle)
            if all(name is None or codec.token_id(name) is not None for name in needed):
                return Infill(codec, family)
        return None

    def prompt(
        self,
        before: str | Sequence[int],
        behind: str,
        *,
        files: Sequence[ExtraFile] = (),
        add_special_tokens: bool = True,
    ) -> list[int]:
        """The ids after which the middle comes. Raises InvalidRequest as `encode` does."""
        family, ids = self._family, self._ids
        prefix = [ids[family.prefix], *self._before(before)]
        suffix = [ids[family.suffix], *self._text(behind, begins=False)]
        parts = [suffix, prefix] if family.suffix_first else [prefix, suffix]
        begin = self._codec.encode_apart("a")[0] if add_special_tokens else []
        middle = [] if family.middle is None else [ids[family.middle]]
        return [*begin, *self._shown(files), *parts[0], *parts[1], *middle]

    def _before(self, text: str | Sequence[int]) -> Sequence[int]:
        return self._text(text) if isinstance(text, str) else text

    def _shown(self, files: Sequence[ExtraFile]) -> list[int]:
        """As models with tokens for it are trained; elsewhere as llama.cpp does it."""
        if not files:
            return []
        shown: list[int] = []
        if (repo := self._id(self._family.repo)) is not None:
            shown += [repo, *self._text(f"{PROJECT}\n", begins=False)]
        separator = self._id(self._family.file)
        for name, text in files:
            if separator is None:
                shown += self._text(SNIPPET + text)
            else:
                shown += [separator, *self._text(f"{name}\n{text}", begins=False)]
        if separator is not None:
            shown += [separator, *self._text(f"{FILE}\n", begins=False)]
        return shown

    def _id(self, name: str | None) -> int | None:
        return None if name is None else self._ids.get(name)

    def _text(self, text: str, *, begins: bool = True) -> list[int]:
        return self._codec.encode_plain(text, frozenset(self._ids), begins=begins) if text else []
