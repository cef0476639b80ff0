"""What a template's process may answer: one byte, and the data that belongs to it.

Read by both sides, so it imports next to nothing.
"""

import struct
from enum import IntEnum
from typing import Any

LENGTH = struct.Struct("!I")  # before each message, and before each answer's kind
MEMORY_STATUS = 77  # the exit status of a process that took more memory than its budget

# What a template is given where there are no tools: None, as transformers has it, is tried first.
NO_TOOLS: dict[str, dict[str, Any]] = {
    "none": {"tools": None},
    "empty": {"tools": []},
    "absent": {},
}


class AnswerKind(IntEnum):
    TEXT = ord("T")  # the prompt
    FACTS = ord("F")  # JSON about the template
    REFUSED = ord("R")  # by the template, in these words
    UNDEFINED = ord("U")  # it uses what nothing defines; the error's line
    FAILED = ord("E")  # in any other way; the error's line
    TOO_LONG = ord("L")  # more characters than asked for
    SURROGATE = ord("S")  # the prompt holds half a character
    NO_JINJA = ord("J")  # the source does not compile; the error's line
    NO_MEMORY = ord("M")  # the process ends itself
