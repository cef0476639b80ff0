"""How commands print: lines and tables for people, one JSON document for programs.

With --json stdout has that document alone, in one line; without it, tables. What is piped is
never wrapped. On a narrow terminal text breaks between words and tables lose columns: a number is
shown whole or not at all.
"""

import json
import sys
from collections.abc import Sequence
from shutil import get_terminal_size
from typing import Annotated, TextIO

import msgspec
from cyclopts import Parameter
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

PIPED_WIDTH = 10_000  # columns: whoever reads a file can scroll
Flat = Parameter(name="*")  # each field of a dataclass is a flag of its own
JsonFlag = Annotated[bool, Parameter(name="--json", negative="")]
SloFlag = Annotated[
    tuple[str, ...], Parameter(name=("--slo", "--goodput"), consume_multiple=True, negative="")
]


def open_console(file: TextIO | None = None, width: int | None = None) -> Console:
    """Where people read: stdout, as wide as its terminal, or endlessly wide if it is none."""
    out = sys.stdout if file is None else file
    if width is None:
        width = get_terminal_size().columns if out.isatty() else PIPED_WIDTH
    # With a height too, or rich takes a terminal that calls itself dumb for one of 80 columns.
    return Console(file=file, width=width, height=25, highlight=False, emoji=False)


def print_json(document: object) -> None:
    """The document as the last line of stdout. A number that JSON does not have (inf) is null."""
    text = msgspec.json.encode(document).decode()
    if "utf" not in (sys.stdout.encoding or "utf-8").lower():
        text = json.dumps(json.loads(text))  # with escapes, in ASCII
    print(text, flush=True)


def say(
    console: Console, words: str | Text, *, markup: bool = False, style: str | None = None
) -> None:
    """A line of text. On a narrow terminal it goes on below, and no word is cut."""
    if isinstance(words, str):
        words = Text.from_markup(words, emoji=False) if markup else Text(words)
    lines = [_broken(line, console.width) for line in words.split("\n", allow_blank=True)]
    console.print(Text("\n").join(lines), style=style, overflow="ignore", crop=False)


def _broken(text: Text, width: int) -> Text:
    """The text with line ends between its words, where a line would be wider than this."""
    first, *others = text.split(" ")
    lines = [first]
    for word in others:
        if cell_len(lines[-1].plain) + 1 + cell_len(word.plain) > width:
            lines.append(word)
        else:
            lines[-1] = Text(" ").join((lines[-1], word))
    return Text("\n").join(lines)


def show_table(
    console: Console, table: Table, *, drop: Sequence[str] = (), wrap: Sequence[int] = ()
) -> None:
    """Print a table that fits the console.

    What is too wide first has the texts of the columns `wrap` broken between words, and then loses
    columns: those of `drop` by their headings, in this order, then from the right. The first
    column, and in tables without headings every column, stays. What was left out is told.
    """
    if table.title:
        say(console, _as_text(table.title))
    kept = list(table.columns)
    texts = [table.columns[place] for place in wrap]
    while True:
        made, width = _fitted(console, table, kept, texts)
        goes = _next_to_go(kept, drop) if table.show_header else None
        if width <= console.width or goes is None:
            break
        kept = [column for column in kept if column is not goes]
    seen, console.width = console.width, max(console.width, width)
    console.print(made, crop=False)
    console.width = seen
    dropped = [_heading(each) for each in table.columns if all(each is not k for k in kept)]
    if dropped:
        say(console, f"not shown, for want of width: {', '.join(dropped)}", style="dim")


def _fitted(
    console: Console, table: Table, kept: list[Column], texts: list[Column]
) -> tuple[Table, int]:
    """The table of these columns, and its width, with `texts` as narrow as they must be."""
    narrow: dict[int, int] = {}  # by place in `kept`
    made = _table_of(table, kept, narrow)
    width = _width(console, made)
    for text in texts:
        place = next((i for i, column in enumerate(kept) if column is text), None)
        if place is None or width <= console.width:
            continue
        cells = [_as_text(cell) for cell in (text.header, *text.cells)]
        own = max(cell_len(cell.plain) for cell in cells)
        longest = max((cell_len(word) for cell in cells for word in cell.plain.split()), default=1)
        narrow[place] = max(own - (width - console.width), longest)
        made = _table_of(table, kept, narrow)
        width = _width(console, made)
    return made, width


def _table_of(table: Table, kept: list[Column], narrow: dict[int, int]) -> Table:
    made = Table(
        box=table.box,
        show_header=table.show_header,
        header_style=table.header_style,
        pad_edge=table.pad_edge,
        padding=table.padding,
    )
    columns = []
    for place, column in enumerate(kept):
        header, cells = column.header, list(column.cells)
        if (width := narrow.get(place)) is not None:
            header = _broken(_as_text(header), width)
            cells = [_broken(_as_text(cell), width) for cell in cells]
        made.add_column(
            header, justify=column.justify, style=column.style, no_wrap=True, overflow="crop"
        )
        columns.append(cells)
    for row in zip(*columns, strict=True):
        made.add_row(*row)
    return made


def _next_to_go(kept: list[Column], drop: Sequence[str]) -> Column | None:
    others = {_heading(column): column for column in kept[1:]}
    for heading in (*drop, *reversed(others)):
        if heading in others:
            return others[heading]
    return None


def _heading(column: Column) -> str:
    return _as_text(column.header).plain


def _as_text(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text.from_markup(str(cell), emoji=False)


def _width(console: Console, table: Table) -> int:
    options = console.options.update(max_width=PIPED_WIDTH)
    return Measurement.get(console, options, table).maximum
