"""A checkpoint's tokenizer: implements core/text.py's TextCodec with the `tokenizers` library.

Reads tokenizer.json, and what tokenizer_config.json, special_tokens_map.json and the chat template
say around it. Knows no requests and no model. One Tokenizer may be used by many threads: once it
is made, nothing in it changes but a cache.

Whether `encode` adds a beginning-of-sequence token is what tokenizer.json says; as in
transformers 5, `add_bos_token` in tokenizer_config.json does not count beside it.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from duetto.core.errors import CheckpointError, InvalidRequest
from duetto.models.bpe_trainer import GPT2_BYTES, PRINTABLE_BYTES
from duetto.models.chat_template import ChatTemplate, load_chat_template
from duetto.models.json_file import JsonSection, read_json

_MAX_ID_DIGITS = 9
_MANY = 4096  # tokens, which take about 0.3 ms to decode
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
    ) -> None:
        """`load_tokenizer` makes one from a directory. The tokenizer is taken over, not copied."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._file = file
        self._chat_template = chat_template
        self._added = {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items()}
        self._skipped = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        self._decoder = tokenizer.decoder
        types = _types(self._decoder)
        self._is_byte_level = "ByteLevel" in types
        self._byte_pieces = _byte_pieces(tokenizer) if "ByteFallback" in types else {}
        self.special_tokens = dict(special_tokens or {})
        ends = set(eos_token_ids)
        eos = tokenizer.token_to_id(self.special_tokens.get("eos_token", ""))
        self._eos_token_ids = frozenset(ends if eos is None else ends | {eos})
        self._vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self._bytes: dict[int, bytes] = {}  # of the tokens asked for so far
        self._max_token_bytes: int | None = None
        if self._is_byte_level and tokenizer.normalizer is None:
            # A piece has a character for each byte; an added token stands for itself.
            added = (len(text.encode()) for text in self._added.values())
            self._max_token_bytes = max((*map(len, tokenizer.get_vocab()), *added), default=1)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return self._vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids given at the start, and the tokenizer's own eos_token."""
        return self._eos_token_ids

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Raise CheckpointError if a token has no row in the model's embedding.

        More rows than tokens are common (rows are padded to a round number): the ids without a
        token decode to nothing.
        """
        if self._vocab_size > model_vocab_size:
            raise CheckpointError(
                self._file,
                f"has token ids up to {self._vocab_size - 1}, but the model's vocabulary is "
                f"{model_vocab_size}: the tokenizer belongs to another model",
            )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequest("prompt", ...) for a string that is not Unicode text."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("prompt", "holds half a surrogate pair") from None
        # As a batch of one, since only a batch releases the GIL while it works.
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        ids: list[int] = encoding.ids
        return ids

    @property
    def max_token_bytes(self) -> int | None:
        """Byte-level tokenizers without a normalizer keep every byte: it is their longest token."""
        return self._max_token_bytes

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Bytes that are no text become U+FFFD, the rest of the text stays as it is."""
        skips = skip_special_tokens
        if len(token_ids) > _MANY:  # only a batch releases the GIL while it works
            (text,) = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skips)
        else:
            text = self._tokenizer.decode(token_ids, skip_special_tokens=skips)
        if self._byte_pieces and "\ufffd" in text:
            return self._decode_runs(token_ids, self._skipped if skip_special_tokens else ())
        return text

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
        """One token alone, with its leading space; half a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text that has begun; b"" for an id without a token."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        if token_id in self._byte_pieces:
            return bytes([self._byte_pieces[token_id]])
        if self._is_byte_level and all(c in _BYTE_OF for c in piece):
            return bytes(_BYTE_OF[c] for c in piece)
        # What a second one adds to the first: so the space before a word shows, and whatever the
        # decoder does to the beginning of a text does not.
        alone = self.decode((token_id,), skip_special_tokens=False)
        twice = self.decode((token_id, token_id), skip_special_tokens=False)
        return twice[len(alone) :].encode()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Apply the chat template; see ChatTemplate.render. Raises InvalidRequest if it refuses."""
        if self._chat_template is None:
            raise InvalidRequest(
                "messages",
                "this model has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); send a prompt to /v1/completions instead",
            )
        return self._chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs
        )


def load_tokenizer(model_dir: Path, *, eos_token_ids: Iterable[int] = ()) -> Tokenizer:
    """The tokenizer of a checkpoint directory.

    `eos_token_ids` are those that config.json and generation_config.json name. Raises
    CheckpointError, naming the file, if one is missing, corrupt or disagrees with another.
    """
    file = model_dir / "tokenizer.json"
    tokenizer = _read_tokenizer(file)
    config = _read_optional(model_dir / "tokenizer_config.json")
    if config is not None:
        _add_tokens(tokenizer, config)
    special_tokens = _special_tokens(config, _read_optional(model_dir / "special_tokens_map.json"))
    return Tokenizer(
        tokenizer,
        file=file,
        special_tokens=special_tokens,
        eos_token_ids=eos_token_ids,
        chat_template=load_chat_template(model_dir, config, special_tokens),
    )


def _read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        hint = "; tokenizer.model alone is not read: let transformers save the tokenizer once"
        has_model = (file.parent / "tokenizer.model").is_file()
        raise CheckpointError(file, "is missing" + (hint if has_model else ""))
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        cause = " ".join(str(error).split())
        raise CheckpointError(file, f"the tokenizers library cannot read it: {cause}") from error


def _read_optional(file: Path) -> JsonSection | None:
    return read_json(file) if file.is_file() else None


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
    """The tokens that have a name; what tokenizer_config.json says counts first."""
    found: dict[str, str] = {}
    for section in filter(None, sections):
        for name in _SPECIAL_TOKEN_NAMES:
            value = section.get(name)
            content = value.get("content") if isinstance(value, Mapping) else value
            if content is None:
                continue
            if not isinstance(content, str):
                section.refuse(name, "must be a string or an object with its content")
            found.setdefault(name, content)
    return found


def _types(decoder: tokenizers.decoders.Decoder | None) -> frozenset[str]:
    """The types that a decoder is made of; it may be a sequence of decoders."""
    if decoder is None:
        return frozenset()
    written = json.loads(decoder.__getstate__())
    return frozenset(part["type"] for part in written.get("decoders", [written]))


def _byte_pieces(tokenizer: tokenizers.Tokenizer) -> dict[int, int]:
    """Token id of each piece <0x00> ... <0xFF> -> the byte."""
    found = ((tokenizer.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
    return {token_id: byte for token_id, byte in found if token_id is not None}


# How byte-level BPE writes bytes as characters (Radford et al., 2019, GPT-2): printable ones stand
# for themselves, the others for the characters from U+0100 on, in order.
_OTHER_BYTES = GPT2_BYTES[len(PRINTABLE_BYTES) :]
_BYTE_OF = {chr(byte): byte for byte in PRINTABLE_BYTES} | {
    chr(0x100 + index): byte for index, byte in enumerate(_OTHER_BYTES)
}
