"""What one token adds to a text that has begun, as bytes. Knows no model and no request."""

import json
from collections.abc import Callable, Mapping, Sequence

import tokenizers

from duetto.checkpoints.bpe_trainer import GPT2_BYTES, PRINTABLE_BYTES
from duetto.core.errors import InvalidRequest

DecodeShown = Callable[[Sequence[int]], str]  # special tokens shown


class TokenBytes:
    """Found by decoding, as the decoder alone knows what it makes of a piece.

    Added tokens are no exception: Gemma's run of four spaces is the added token ▁▁▁▁.
    """

    def __init__(
        self, library: tokenizers.Tokenizer, decode: DecodeShown, byte_pieces: Mapping[int, int]
    ) -> None:
        """`byte_pieces` are those that the decoder joins to characters."""
        self._library = library
        self._decode = decode
        types = decoder_types(library.decoder)
        self._is_byte_level = "ByteLevel" in types
        self._is_only_byte_level = types == {"ByteLevel"}
        self._byte_pieces = byte_pieces
        self._neighbour = self._find_letter()
        self._found: dict[int, bytes] = {}  # of the tokens asked for so far

    def __getitem__(self, token_id: int) -> bytes:
        """b"" for an id without a token."""
        found = self._found.get(token_id)
        if found is None:
            found = self._found[token_id] = self._find(token_id)
        return found

    def _find(self, token_id: int) -> bytes:
        piece = self._library.id_to_token(token_id)
        if piece is None:
            return b""
        if token_id in self._byte_pieces:
            return bytes([self._byte_pieces[token_id]])
        spelt = _byte_level(piece) if self._is_byte_level else None
        if self._is_only_byte_level:
            return piece.encode() if spelt is None else spelt
        try:
            text = self._added_text(token_id)
        except InvalidRequest:  # the decoder fails on it: its name is the best there is
            return piece.encode()
        if spelt is not None and "\ufffd" in text:
            return spelt  # half a character
        return text.encode()

    def _added_text(self, token_id: int) -> str:
        """Between two others: a decoder may drop spaces at the beginning or end of a text."""
        other = token_id if self._neighbour is None else self._neighbour
        before, alone = self._decode((other,)), self._decode((other, other))
        after = alone[len(before) :] if alone.startswith(before) else ""
        text = self._decode((other, token_id, other))
        if text.startswith(before) and text.endswith(after):
            return text[len(before) : len(text) - len(after)]
        return self._decode((other, token_id))[len(before) :]

    def _find_letter(self) -> int | None:
        """A token that is one letter wherever it stands; of most tokenizers the first one is."""
        for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
            token_id = self._library.token_to_id(letter)
            if token_id is not None and self._decode((token_id,)) == letter:
                return int(token_id)
        return None


def decoder_types(decoder: tokenizers.decoders.Decoder | None) -> frozenset[str]:
    """The types that a decoder is made of; a sequence of decoders may hold others."""
    if decoder is None:
        return frozenset()
    found, left = set(), [json.loads(decoder.__getstate__())]
    while left:
        part = left.pop()
        found.add(part["type"])
        left += part.get("decoders", ())
    return frozenset(found - {"Sequence"})


def byte_pieces(library: tokenizers.Tokenizer) -> dict[int, int]:
    """Token id of each piece <0x00> ... <0xFF> -> the byte."""
    found = ((library.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
    return {token_id: byte for token_id, byte in found if token_id is not None}


def _byte_level(piece: str) -> bytes | None:
    """The bytes of a piece that is written as byte-level BPE does; None if it is not."""
    if all(c in _BYTE_OF for c in piece):
        return bytes(_BYTE_OF[c] for c in piece)
    return None


# How byte-level BPE writes bytes as characters (Radford et al., 2019, GPT-2): printable ones stand
# for themselves, the others for the characters from U+0100 on, in order.
_OTHER_BYTES = GPT2_BYTES[len(PRINTABLE_BYTES) :]
_BYTE_OF = {chr(byte): byte for byte in PRINTABLE_BYTES} | {
    chr(0x100 + index): byte for index, byte in enumerate(_OTHER_BYTES)
}
