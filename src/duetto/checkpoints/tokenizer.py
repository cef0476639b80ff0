"""A checkpoint's tokenizer: implements core/text.py's TextCodec with the `tokenizers` library.

Reads tokenizer.json, and what tokenizer_config.json, special_tokens_map.json and the chat template
say around it. Knows no requests, and of the model only how many rows its embedding has, which need
not be as many as there are tokens. One Tokenizer may be used by many threads: once it is made,
nothing in it changes but a cache.

Whether `encode` adds a beginning-of-sequence token is what tokenizer.json says; as in
transformers 5, `add_bos_token` in tokenizer_config.json does not count beside it.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any

import tokenizers
from tokenizers import AddedToken

from duetto.checkpoints.chat_template import ChatTemplate
from duetto.checkpoints.checkpoint_file import is_there, read_part
from duetto.checkpoints.json_file import JsonSection, read_json
from duetto.checkpoints.plain_text import PlainText
from duetto.checkpoints.template_files import load_chat_template
from duetto.checkpoints.token_bytes import TokenBytes, byte_pieces, decoder_types
from duetto.checkpoints.token_rows import check_vocabulary, tokens_beyond
from duetto.checkpoints.token_starts import keep_offsets, token_starts
from duetto.checkpoints.tokenizer_growth import check_growth
from duetto.checkpoints.tokenizer_library import LibraryError, call, library_error, refusing_panics
from duetto.core.errors import CheckpointError, InvalidRequest
from duetto.core.structured import Vocabulary
from duetto.core.text import ChatTemplateFacts

# Texts come one at a time, for which the library's own threads do nothing; so a text is worked on
# by the thread that asks, with the priority that this thread has.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_MAX_ID_DIGITS = 9
_MANY = 4096  # tokens, which take about 0.3 ms to decode
_PLAIN_TEXT = "Hello, world! It's 1 é, 世 and\n  no more."
_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """Text to token ids and back, for one checkpoint."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        file: Path = Path("tokenizer.json"),
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_template: ChatTemplate | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """`load_tokenizer` makes one from a directory. The tokenizer is taken over, not copied.

        `vocab_size` is how many rows the model's embedding has; without a model, as many as there
        are ids. Raises CheckpointError if the tokenizer belongs to a model with more.
        """
        parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        check_growth(file, **{name: getattr(tokenizer, name) for name in parts})
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.post_processor = keep_offsets(tokenizer.post_processor)
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._vocab_size = _num_ids(tokenizer) if vocab_size is None else vocab_size
        self.tokens_without_row = tokens_beyond(tokenizer, self._vocab_size)
        check_vocabulary(tokenizer, self.tokens_without_row, self._vocab_size, file)
        self._skipped = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self._decoder = tokenizer.decoder
        has_bytes = "ByteFallback" in decoder_types(tokenizer.decoder)
        self._byte_pieces = byte_pieces(tokenizer) if has_bytes else {}
        self._bytes = TokenBytes(tokenizer, self._decode_all, self._byte_pieces)
        self.special_tokens = dict(special_tokens or {})
        eos = tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        ends = {*eos_token_ids} if eos is None else {*eos_token_ids, eos}
        self._eos_token_ids = frozenset(i for i in ends if i < self._vocab_size)
        self._max_token_bytes = _longest_token(tokenizer)
        self._plain: PlainText | None = None  # made when it is first asked for
        self._plain_lock = Lock()

    @property
    def vocab_size(self) -> int:
        """How many rows the model has: each id below is an ordinary id, also without a token."""
        return self._vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids given at the start, and the tokenizer's own eos_token, where they have a row."""
        return self._eos_token_ids

    def tokens(self) -> dict[int, tuple[str, bool]]:
        """Every token by its id, as the vocabulary spells it, and whether it is special."""
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        return {i: (token, i in self._skipped) for token, i in vocab.items()}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequest("prompt", ...) for a string that is not Unicode text, that spells
        a token which the model has no row for, or that the library fails on."""
        encoding = self._encode(self._tokenizer.encode_batch_fast, text, add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def encode_with_starts(
        self, text: str, *, add_special_tokens: bool = True
    ) -> tuple[list[int], list[int]]:
        """As `encode`, and where in `text` each token begins."""
        encoding = self._encode(self._tokenizer.encode_batch, text, add_special_tokens)
        return encoding.ids, token_starts(encoding.offsets, text)

    def encode_plain(self, text: str, apart: frozenset[str], *, begins: bool = True) -> list[int]:
        """The ids of a text in which nothing is a special token, nor one of `apart`."""
        _check_unicode(text)
        try:
            with self._plain_lock:
                if self._plain is None:
                    self._plain = PlainText(self._tokenizer, apart)
            ids = self._plain.encode(text, begins=begins)
        except LibraryError as error:
            raise InvalidRequest(
                "prompt", f"this model's tokenizer cannot encode the text: {error}"
            ) from error
        if self.tokens_without_row:
            self._check_rows(ids)
        return ids

    def token_id(self, token: str) -> int | None:
        """None also for a token that the model has no row for."""
        token_id = self._tokenizer.token_to_id(token)
        return None if token_id is None or token_id >= self._vocab_size else int(token_id)

    def encode_apart(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """The ids of the text alone, and what `encode` puts before and after them (BOS, EOS)."""
        encoding = self._encode(self._tokenizer.encode_batch_fast, text, True)
        # The mask is of what the library has added, not of special tokens that the text spells.
        ids, added = encoding.ids, encoding.special_tokens_mask
        start = next((i for i, is_added in enumerate(added) if not is_added), len(ids))
        end = next((i for i in range(len(ids), start, -1) if not added[i - 1]), start)
        return ids[:start], ids[start:end], ids[end:]

    def _encode(
        self, encode_batch: Callable[..., list[Any]], text: str, add_special_tokens: bool
    ) -> Any:
        _check_unicode(text)
        try:
            # As a batch of one, since only a batch releases the GIL while it works.
            (encoding,) = call(encode_batch, [text], add_special_tokens=add_special_tokens)
        except LibraryError as error:
            raise InvalidRequest(
                "prompt", f"this model's tokenizer cannot encode the text: {error}"
            ) from error
        if self.tokens_without_row:
            self._check_rows(encoding.ids)
        return encoding

    def _check_rows(self, token_ids: Sequence[int]) -> None:
        highest = max(token_ids, default=0)
        if highest >= self._vocab_size:
            raise InvalidRequest(
                "prompt",
                f"spells the token {self.tokens_without_row[highest]!r} ({highest}), which this "
                f"model cannot read: its vocabulary is {self._vocab_size}",
            )

    @property
    def max_token_bytes(self) -> int | None:
        """Byte-level tokenizers without a normalizer keep every byte: it is their longest token."""
        return self._max_token_bytes

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Bytes that are no text become U+FFFD, the rest of the text stays as it is.

        Raises InvalidRequest("prompt", ...) if the library fails on these ids.
        """
        skips, library = skip_special_tokens, self._tokenizer
        text: str
        try:
            if len(token_ids) > _MANY:  # only a batch releases the GIL while it works
                (text,) = library.decode_batch([token_ids], skip_special_tokens=skips)
            else:
                text = library.decode(token_ids, skip_special_tokens=skips)
            if self._byte_pieces and "\ufffd" in text:
                text = self._decode_runs(token_ids, self._skipped if skips else ())
        except BaseException as error:
            cause = library_error(error)
            raise InvalidRequest(
                "prompt", f"this model's tokenizer cannot decode these token ids: {cause}"
            ) from error
        return text

    def _decode_all(self, token_ids: Sequence[int]) -> str:
        return self.decode(token_ids, skip_special_tokens=False)

    def _decode_runs(self, token_ids: Sequence[int], skipped: Collection[int]) -> str:
        """As `decode`, where one wrong byte in a run of byte pieces does not spoil the whole run.

        The library shows U+FFFD for every byte of such a run, so text that was already shown
        would change when the next byte comes. SentencePiece itself shows what is valid.
        """
        found = ((i, self._tokenizer.id_to_token(i)) for i in token_ids if i not in skipped)
        shown = [(i, piece) for i, piece in found if piece]
        pieces: list[str] = []
        for is_byte, run in groupby(shown, key=lambda token: token[0] in self._byte_pieces):
            if is_byte:
                pieces.append(bytes(self._byte_pieces[i] for i, _ in run).decode(errors="replace"))
            else:
                pieces += (piece for _, piece in run)
        text: str = self._decoder.decode(pieces)
        return text

    def token_text(self, token_id: int) -> str:
        """What one token adds to a text that has begun; half a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text that has begun; b"" for an id without a token."""
        return self._bytes[token_id]

    def vocabulary(self) -> Vocabulary:
        """All tokens that the model has a row for. Takes about a second where there are many."""
        special = {token: i for i, (token, is_special) in self.tokens().items() if is_special}
        return Vocabulary(
            [self._bytes[token_id] for token_id in range(self._vocab_size)],
            {token: i for token, i in special.items() if i < self._vocab_size},
            self._eos_token_ids,
        )

    @property
    def chat_note(self) -> str | None:
        """What keeps chats from being rendered, or what they must bring; see ChatTemplate."""
        return None if self._chat_template is None else self._chat_template.note

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        continue_final_message: bool = False,
    ) -> str:
        """Apply the chat template; see ChatTemplate.render. Raises InvalidRequest if it refuses."""
        if self._chat_template is None:
            raise InvalidRequest(
                "messages",
                "this model has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); send a prompt to /v1/completions instead",
            )
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs,
            documents=documents,
            tools=tools,
            continue_final_message=continue_final_message,
        )

    def chat_template_facts(self, *, with_tools: bool = False) -> ChatTemplateFacts | None:
        """Of the template of chats with tools, or without; None if there is none."""
        template = self._chat_template
        return None if template is None else template.facts(with_tools=with_tools)


def load_tokenizer(
    model_dir: Path,
    *,
    eos_token_ids: Iterable[int] = (),
    vocab_size: int | None = None,
    chat_template: Path | None = None,
) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    `eos_token_ids` are those that config.json and generation_config.json name, `vocab_size` the
    rows of the model, `chat_template` a file instead of the checkpoint's own. Raises
    CheckpointError, naming the file, if one is missing, corrupt or disagrees with another, or if
    the tokenizer belongs to another model.
    """
    file = model_dir / "tokenizer.json"
    config = _read_optional(model_dir / "tokenizer_config.json")
    special_tokens = _special_tokens(config, _read_optional(model_dir / "special_tokens_map.json"))
    template = load_chat_template(model_dir, config, special_tokens, chat_template)
    with refusing_panics(file):
        tokenizer = _read_tokenizer(file)
        if config is not None:
            _add_tokens(tokenizer, config)
        made = Tokenizer(
            tokenizer,
            file=file,
            special_tokens=special_tokens,
            eos_token_ids=eos_token_ids,
            chat_template=template,
            vocab_size=vocab_size,
        )
        _try_out(tokenizer)
    return made


def _try_out(tokenizer: tokenizers.Tokenizer) -> None:
    """Raise LibraryError if the library panics over plain text: no request could be served.

    What it refuses in order (a word that has no token) is for a request to hear.
    """
    try:
        (encoding,) = call(tokenizer.encode_batch_fast, [_PLAIN_TEXT])
        call(tokenizer.decode, encoding.ids)
    except LibraryError as error:
        if error.is_panic:
            raise


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    if not is_there(file):
        hint = "; tokenizer.model alone is not read: let transformers save the tokenizer once"
        has_model = (file.parent / "tokenizer.model").is_file()
        raise CheckpointError(file, "is missing" + (hint if has_model else ""))
    data = read_part(file)
    try:
        return call(tokenizers.Tokenizer.from_buffer, data)
    except LibraryError as error:
        raise CheckpointError(file, f"the tokenizers library cannot read it: {error}") from error


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("prompt", "holds half a surrogate pair") from None


def _read_optional(file: Path) -> JsonSection | None:
    return read_json(file) if is_there(file) else None


def _add_tokens(tokenizer: tokenizers.Tokenizer, config: JsonSection) -> None:
    """The added tokens of tokenizer_config.json that tokenizer.json does not know."""
    section = config.section("added_tokens_decoder")
    if section is None:
        return
    known = tokenizer.get_added_tokens_decoder()
    for key in sorted(section.values, key=lambda key: (len(key), key)):  # by number
        token = section.section(key)
        is_id = key.isdecimal() and len(key) <= _MAX_ID_DIGITS
        if not is_id or token is None or not isinstance(token.get("content"), str):
            section.refuse(key, "must be a token id with the token's content")
        content = token.get("content")
        if int(key) in known and known[int(key)].content == content:
            continue
        flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
        values = {name: token.flag(name, default=False) for name in flags}
        tokenizer.add_tokens([AddedToken(content, **values)])
        got = tokenizer.token_to_id(content)
        if got != int(key):
            section.refuse(key, f"is {content!r}, which tokenizer.json has as {got}")


def _special_tokens(*sections: JsonSection | None) -> dict[str, str]:
    """The tokens that have a name; what tokenizer_config.json says counts first.

    Beside the usual names a model may have its own (`image_token`), as transformers knows them:
    here or in extra_special_tokens.
    """
    found: dict[str, str] = {}
    for section in filter(None, sections):
        for name in _SPECIAL_TOKEN_NAMES:
            content = _content(section.get(name))
            if content is None:
                continue
            if not isinstance(content, str):
                section.refuse(name, "must be a string or an object with its content")
            found.setdefault(name, content)
        extra = section.get("extra_special_tokens")
        own = [item for item in section.values.items() if item[0].endswith("_token")]
        own += extra.items() if isinstance(extra, Mapping) else ()
        for name, value in own:
            if name not in _SPECIAL_TOKEN_NAMES and isinstance(_content(value), str):
                found.setdefault(name, _content(value))
    return found


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, Mapping) else value


def _num_ids(tokenizer: tokenizers.Tokenizer) -> int:
    """One more than the highest token id."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _longest_token(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Bytes of text that a token stands for at most, where that is known.

    A normalizer or another decoder may drop text; an added token may swallow the spaces beside it.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    is_byte_level = decoder_types(tokenizer.decoder) == {"ByteLevel"}
    if not is_byte_level or tokenizer.normalizer or any(t.lstrip or t.rstrip for t in added):
        return None
    # A piece has a character for each byte; an added token stands for itself.
    lengths = (len(token.content.encode()) for token in added)
    return max((*map(len, tokenizer.get_vocab()), *lengths), default=1)
