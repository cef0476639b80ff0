"""`duetto tokenize`: how a text splits into tokens, and how such a splitting is learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Literal

from cyclopts import Parameter, validators
from rich.table import Table
from rich.text import Text

from duetto.build import find_checkpoint
from duetto.checkpoints.bpe_trainer import Merge, learn_merges, split_words
from duetto.checkpoints.tokenizer import Tokenizer, load_tokenizer
from duetto.cli.default_model import model_or_demo
from duetto.cli.output import JsonFlag, open_console, print_json, say, show_table
from duetto.cli.stdin import read_stdin
from duetto.core.errors import ConfigError
from duetto.core.text import bytes_in_place

_MAX_ROWS = 200  # of the table; --json has them all
_COLOURS = ("black on bright_cyan", "black on bright_yellow", "black on bright_green")


def tokenize(
    text: str | None = None,
    *,
    model: str | None = None,
    file: Path | None = None,
    json_output: JsonFlag = False,
    special: bool = True,
    train: Literal["bpe"] | None = None,
    merges: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 50,
) -> None:
    """Show how a text splits into tokens: ids, pieces, and characters per token.

    Parameters
    ----------
    text
        The text; with --train, the file to learn from. Read from stdin if left out.
    model
        A checkpoint directory, or org/name on the Hugging Face hub; by default the small reader
        that ships with Duetto.
    file
        A file with the text.
    json_output
        The last line of stdout is one JSON document.
    special
        Let the tokenizer add its beginning of sequence and the like.
    train
        Learn byte-pair merges from a text instead, and print each as it is learned.
    merges
        How many merges to learn.
    """
    if text is not None and file is not None:
        raise ConfigError("--file: give either a text or a file, not both")
    if train is not None:
        path = file if file is not None else None if text is None else Path(text)
        _train(_read(path), merges, json_output)
        return
    tokenizer = load_tokenizer(find_checkpoint(model_or_demo(model)))
    split = _split(tokenizer, _read(file) if text is None else text, special)
    if json_output:
        print_json(split.as_json())
    else:
        _print_split(split)


@dataclass(frozen=True, slots=True)
class _Split:
    text: str
    token_ids: Sequence[int]
    token_bytes: Sequence[bytes]

    @property
    def characters_per_token(self) -> float:
        return len(self.text) / max(1, len(self.token_ids))

    def as_json(self) -> dict[str, Any]:
        return {
            "num_tokens": len(self.token_ids),
            "num_characters": len(self.text),
            "num_bytes": len(self.text.encode()),
            "characters_per_token": round(self.characters_per_token, 4),
            "token_ids": list(self.token_ids),
            "pieces": [visible(piece) for piece in self.token_bytes],
            "bytes": [list(piece) for piece in self.token_bytes],
        }

    def summary(self) -> str:
        return (
            f"{len(self.token_ids):,} tokens, {len(self.text):,} characters, "
            f"{len(self.text.encode()):,} bytes: "
            f"{self.characters_per_token:.2f} characters per token"
        )


def visible(piece: bytes) -> str:
    """A piece with nothing in it that cannot be seen: spaces as ␣, half characters as <0xE4>."""
    shown: list[str] = []
    for character in piece.decode(errors="surrogateescape"):
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:  # a byte that is no text, as "surrogateescape" writes it
            shown.append(f"<0x{code - 0xDC00:02X}>")
        elif character == " ":
            shown.append("␣")
        elif character.isprintable():
            shown.append(character)
        else:
            shown.append(character.encode("unicode_escape").decode())
    return "".join(shown)


def _split(tokenizer: Tokenizer, text: str, special: bool) -> _Split:
    token_ids = tokenizer.encode(text, add_special_tokens=special)
    return _Split(text, token_ids, bytes_in_place(tokenizer, token_ids))


def _print_split(split: _Split) -> None:
    console = open_console()
    pieces = [visible(piece) for piece in split.token_bytes]
    if console.is_terminal:
        coloured = Text()
        for i, piece in enumerate(pieces):
            coloured.append(piece, style=_COLOURS[i % len(_COLOURS)])
        console.print(coloured)
    table = Table("token", "id", "piece", "bytes", box=None, header_style="bold")
    for i, (token_id, piece) in enumerate(zip(split.token_ids, pieces, strict=True)):
        if i == _MAX_ROWS:
            break
        table.add_row(str(i), str(token_id), Text(piece), split.token_bytes[i].hex(" "))
    show_table(console, table, drop=("bytes", "token"))
    if len(pieces) > _MAX_ROWS:
        say(console, f"... and {len(pieces) - _MAX_ROWS:,} more; --json has them all")
    say(console, split.summary())


def _train(text: str, num_merges: int, json_output: bool) -> None:
    """Print the merges as they are learned, then what they make of the text."""
    start = monotonic()
    learned: list[Merge] = []
    for merge in learn_merges(text, num_merges):
        learned.append(merge)
        if not json_output:
            left, right = visible(merge.left), visible(merge.right)
            piece = visible(merge.piece)
            print(f"{merge.rank:6}  {left} + {right} → {piece}  ({merge.count:,})", flush=True)
    num_bytes = len(text.encode())
    num_words = len(split_words(text))
    if json_output:
        document = {
            "num_bytes": num_bytes,
            "num_words": num_words,
            "merges": [[visible(m.left), visible(m.right), m.count] for m in learned],
        }
        print_json(document)
        return
    print(
        f"{len(learned):,} merges from {num_words:,} words, {num_bytes:,} bytes, "
        f"in {monotonic() - start:.1f} s"
    )
    if len(learned) < num_merges:
        print("no pair occurs twice any more")


def _read(path: Path | None) -> str:
    if path is None:
        return read_stdin()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from error
