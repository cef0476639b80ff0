"""Token ids to text while they come, and the stop strings in it. Standard library only.

Knows no tokenizer, only a `decode` function: whole ids in, text out. What is emitted is never taken
back, so two things are held until they are certain: a character whose bytes have not all come, and
a text that may yet become a stop string.

Decoding is not additive: `decode(a + b)` may differ from `decode(a) + decode(b)`, because some
tokenizers drop the first space of a text and because a character may span tokens. So the newest
tokens are decoded together with some that came before them (a window, as in vLLM and TGI), and the
window is moved on only where a character has ended.
"""

from collections.abc import Callable, Sequence
from os.path import commonprefix
from typing import NamedTuple

from duetto.core.sampling_params import SamplingParams

Decode = Callable[[Sequence[int], bool], str]

UNFINISHED = "\ufffd"  # what tokenizers decode an incomplete character to
_STRIDE = 4  # tokens between two moves of the window, and its left context at least
_MOST_HELD = 64  # tokens; a character has 4 bytes at most, so more than this is not text


class TextDelta(NamedTuple):
    """What pushed tokens added to the text."""

    text: str
    num_tokens: int  # how many of the pushed tokens belong to the answer; fewer only at a stop
    stop: str | None = None  # the stop string that ended the text


class Detokenizer:
    """The text of one request's output."""

    __slots__ = ("_min_tokens", "_num_tokens", "_stops", "_window")

    def __init__(
        self, decode: Decode, prompt_token_ids: Sequence[int], sampling: SamplingParams
    ) -> None:
        """`decode(token_ids, skip_special_tokens)` must give the text of any ids, alone or joined.

        The prompt is left context only: no text of it is ever emitted or matched.
        """
        self._window = _Window(decode, sampling.skip_special_tokens, prompt_token_ids)
        self._stops = (
            _StopStrings(sampling.stop, sampling.include_stop_str_in_output)
            if sampling.stop
            else None
        )
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0

    def push(
        self, token_ids: Sequence[int], *, is_last: bool = False, hide_last: bool = False
    ) -> TextDelta:
        """Append a step's tokens and return the text that became certain.

        A `stop` in the result ends the request: its text is complete, and tokens beyond
        `num_tokens` are not part of it. `is_last` says that the request ends with these tokens (or
        with none, after an abort), so what was held back comes too. `hide_last` leaves the text of
        the last token out: that of a stop token which is not to be shown.

        The concatenated text, the stop and the token at which it is found do not depend on how the
        tokens are split into pushes.
        """
        shown = token_ids[:-1] if hide_last else token_ids
        pieces: list[str] = []
        for index, token_id in enumerate(shown):
            self._num_tokens += 1
            text, stop = self._match(self._window.push(token_id))
            pieces.append(text)
            if stop is not None:
                return TextDelta("".join(pieces), index + 1, stop)
        if is_last:
            text, stop = self._match(self._window.flush())
            pieces.append(text)
            if stop is not None:
                return TextDelta("".join(pieces), len(token_ids), stop)
            if self._stops is not None:
                pieces.append(self._stops.flush())
        return TextDelta("".join(pieces), len(token_ids))

    def _match(self, text: str) -> tuple[str, str | None]:
        # As min_tokens forbids an end before that many tokens, their text cannot be a stop either.
        if self._stops is None or self._num_tokens <= self._min_tokens:
            return text, None
        return self._stops.push(text)


class TokenPlace(NamedTuple):
    """Where a token stands in a text."""

    start: int
    text: str  # what became certain with it


class TokenPlaces:
    """Where each token begins in the text that a Detokenizer shows of the same tokens.

    Counted in characters. Tokens that are parts of one character begin where it does; a token
    without text begins where the text before it ends. Stop strings cut the text, not the count.
    """

    __slots__ = ("_decode", "_num_emitted", "_skip", "_window")

    def __init__(
        self,
        decode: Decode,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        start: int = 0,
    ) -> None:
        """`start` is how much is shown before: an echoed prompt."""
        self._decode = decode
        self._skip = skip_special_tokens
        self._window = _Window(decode, skip_special_tokens, prompt_token_ids)
        self._num_emitted = start

    def push(self, token_id: int) -> TokenPlace:
        before = self._window.held
        new = self._window.push(token_id)
        after = new + self._window.held
        if before and before == after:
            # One more byte of the character that is held, or nothing to be seen.
            adds = bool(self._decode((token_id, token_id), self._skip))
            within = len(before) - adds
        else:  # what is held was a beginning of something else, or is a character of its own now
            within = len(commonprefix((before, after)))  # noqa: RUF071  no paths
        start = self._num_emitted + within
        self._num_emitted += len(new)
        return TokenPlace(start, new)


class _Window:
    """The last few tokens of a text, decoded together.

    tokens   [ left context | since the window was moved ]
    text     [ emitted                | certain now | unfinished ]
    """

    __slots__ = (
        "_decode",
        "_num_context",
        "_num_emitted",
        "_prompt_text",
        "_skip",
        "_tokens",
        "held",
    )

    def __init__(self, decode: Decode, skip_special: bool, prompt: Sequence[int]) -> None:
        self._decode = decode
        self._skip = skip_special
        self.held = ""  # of the output's text: its unfinished end
        self._tokens: list[int] = []
        self._num_context = 0
        # The context must show some text, or a tokenizer that drops a text's first space would
        # drop that of the output; and it must not begin within a character.
        size, text = _STRIDE, ""
        while text[:1] in ("", UNFINISHED) and len(self._tokens) < len(prompt):
            self._tokens = list(prompt[-size:])
            self._num_context, text = self._whole_characters()
            size *= 4
        self._num_emitted = len(text)  # characters of the window's text
        # A prompt of ids may end within a character. Until something is emitted, what the output
        # makes of it is compared with this; None otherwise.
        whole = self._num_context == len(self._tokens) and not text.endswith(UNFINISHED)
        self._prompt_text = None if whole else decode(self._tokens, skip_special)

    def _whole_characters(self) -> tuple[int, str]:
        """How many of the tokens end where a character does, and their text."""
        for missing in range(4):  # a character has 4 bytes at most, so it lacks 3 tokens at most
            num_tokens = max(0, len(self._tokens) - missing)
            text = self._decode(self._tokens[:num_tokens], self._skip)
            if not text.endswith(UNFINISHED):
                return num_tokens, text
        return len(self._tokens), self._decode(self._tokens, self._skip)

    def push(self, token_id: int) -> str:
        """Append a token and return the text that became certain."""
        self._tokens.append(token_id)
        text = self._decode(self._tokens, self._skip)
        unfinished = text.endswith(UNFINISHED)
        new = self._emit(text, len(text.rstrip(UNFINISHED)) if unfinished else len(text))
        self.held = self._unfinished(text) if unfinished else ""
        if not new and not self._decode((token_id, token_id), self._skip):
            # A token without text (a skipped special one) is no use as context. Twice, as the
            # single space of a text that is a space may be what the tokenizer drops.
            self._tokens.pop()
        elif len(self._tokens) - self._num_context >= _STRIDE and not unfinished:
            self._move()
        elif len(self._tokens) - self._num_context >= _MOST_HELD:
            new += self._give_up(text)
        return new

    def flush(self) -> str:
        """All that is held back."""
        text = self._decode(self._tokens, self._skip)
        return self._emit(text, len(text))

    def _emit(self, text: str, end: int) -> str:
        if self._prompt_text is not None:
            common = commonprefix((self._prompt_text, text[:end]))  # noqa: RUF071  no paths
            self._num_emitted = max(self._num_emitted, len(common))
        if end <= self._num_emitted:
            return ""
        new = text[self._num_emitted : end]
        self._num_emitted = end
        self._prompt_text = None
        return new

    def _unfinished(self, text: str) -> str:
        """What of the window's text is the output's, and not emitted."""
        start = self._num_emitted
        if self._prompt_text is not None:
            start = max(start, len(commonprefix((self._prompt_text, text))))  # noqa: RUF071
        return text[start:]

    def _move(self) -> None:
        """At the end of a character: what came since the last move becomes the left context."""
        self._tokens = self._tokens[self._num_context :]
        self._num_context = len(self._tokens)
        self._num_emitted = len(self._decode(self._tokens, self._skip))

    def _give_up(self, text: str) -> str:
        """Bytes that are no text have come for long: cut the window, else time is quadratic.

        Cut where both sides decode alone as they do together. If the right side shows something,
        a character cannot span such a cut.
        """
        for cut in range(len(self._tokens) - 1, 0, -1):
            left = self._decode(self._tokens[:cut], self._skip)
            right = self._decode(self._tokens[cut:], self._skip)
            if right and left + right == text:
                break
        new = self._emit(text, len(left))
        self.held = text[self._num_emitted :]
        self._tokens = self._tokens[cut:]
        self._num_context = 0
        self._num_emitted = 0
        self._prompt_text = None
        return new


class _StopStrings:
    """Finds stop strings in a text that comes in pieces, in time linear in the text.

    The first piece with which any stop string is complete ends the text. If several are complete
    with it, the one that starts first is found; of those, the longest.
    """

    __slots__ = ("_held", "_include", "_searches")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._searches = [_Search(stop) for stop in stops]
        self._include = include
        self._held = ""  # a possible beginning of a stop string

    def push(self, text: str) -> tuple[str, str | None]:
        """Return the text that may be shown, and the stop string if there is one."""
        found: list[tuple[int, int, str]] = []  # (start in held + text, -length, stop)
        for search in self._searches:
            end = search.push(text)
            if end is not None:
                stop = search.stop
                found.append((len(self._held) + end - len(stop), -len(stop), stop))
        text = self._held + text
        if found:
            start, negative_length, stop = min(found)
            self._held = ""
            return text[: start - negative_length if self._include else start], stop
        certain = len(text) - max(search.num_matched for search in self._searches)
        self._held = text[certain:]
        return text[:certain], None

    def flush(self) -> str:
        """All that is held back."""
        held, self._held = self._held, ""
        return held


class _Search:
    """One string, searched for in a text that comes in pieces (Knuth, Morris and Pratt, 1977)."""

    __slots__ = ("_border", "num_matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0  # longest beginning of `stop` that the text so far ends with
        self._border = [0]  # of stop[: i + 1]: its longest end that is a beginning of it too

    def push(self, text: str) -> int | None:
        """Return where in `text` the first occurrence of the string ends, or None."""
        stop, matched, i = self.stop, self.num_matched, 0
        while i < len(text):
            if matched == 0:  # jump to where one may begin
                i = text.find(stop[0], i)
                if i < 0:
                    break
            matched = self._advance(matched, text[i])
            i += 1
            if matched == len(stop):
                return i
        self.num_matched = matched
        return None

    def _advance(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._border_of(matched)
        return matched + 1 if self.stop[matched] == character else 0

    def _border_of(self, size: int) -> int:
        """The border of `size` characters. Found once it is needed: few stops ever match for long,
        and all of it for each of n answers would hold a step up."""
        border = self._border
        while len(border) < size:
            border.append(self._advance(border[-1], self.stop[len(border)]))
        return border[size - 1]
