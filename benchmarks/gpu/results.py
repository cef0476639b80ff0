"""What the parts found, in one file that is whole at every instant: runs can be resumed.

One file, since few come back from a lent machine. Standard library only.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["done", "failed"]
FILE = "gpu.json"
LOG = "gpu.log"


@dataclass(frozen=True, slots=True)
class Outcome:
    state: State
    seconds: float
    found: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""  # the last lines of what it said


class Results:
    """The outcomes of parts on one device, kept in a folder."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a file that is no such results."""
        self.folder = folder
        self.about: dict[str, Any] = {}
        self.outcomes: dict[str, Outcome] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            self._read()

    @property
    def file(self) -> Path:
        return self.folder / FILE

    def is_done(self, name: str) -> bool:
        return name in self.outcomes and self.outcomes[name].state == "done"

    def found(self) -> dict[str, Mapping[str, Any]]:
        """Of the parts that are done."""
        return {name: one.found for name, one in self.outcomes.items() if one.state == "done"}

    def set(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        self._write()

    def begin_on(self, about: Mapping[str, Any]) -> None:
        """What was found on another device stands aside: ratios of two devices mean nothing."""
        theirs = self.about.get("name")
        if self.outcomes and theirs not in (None, about["name"]):
            words = "".join(c if c.isalnum() else "-" for c in str(theirs))
            self.file.replace(self.folder / f"gpu-{words}.json")
            self.outcomes = {}
        self.about = dict(about)
        self._write()

    def _write(self) -> None:
        values = {
            "about": self.about,
            "parts": {
                name: {
                    "state": one.state,
                    "seconds": round(one.seconds, 2),
                    "found": one.found,
                    "error": one.error,
                }
                for name, one in self.outcomes.items()
            },
        }
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        part.replace(self.file)

    def _read(self) -> None:
        try:
            values = json.loads(self.file.read_text(encoding="utf-8"))
            self.about = values["about"]
            self.outcomes = {name: Outcome(**one) for name, one in values["parts"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.file}: is no file of results ({error})") from error
