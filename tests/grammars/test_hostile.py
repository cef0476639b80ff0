"""Hostile constraints, written by a seed: refused in words, or grammars that work.

`benchmarks/hostile_schemas.py` writes them, and asks of 10^5 what is asked of a few here; each in a
process that may die, which shows what a native library cannot survive.
"""

from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

PATH = Path(__file__).parent.parent.parent / "benchmarks" / "hostile_schemas.py"
SPEC = spec_from_file_location("hostile_schemas", PATH)
hostile = module_from_spec(SPEC)
SPEC.loader.exec_module(hostile)
NUMBERS = range(13, 88)  # each of them in little time


def test_each_is_refused_or_works():
    grammars, outcomes, kinds = hostile.byte_grammars(), Counter(), set()
    for number in NUMBERS:
        kinds |= {*hostile.hostile_constraint(number)}
        what, _ = hostile.outcome(grammars, number)  # raises what is a fault
        outcomes[what] += 1
    assert outcomes["refused"] > len(NUMBERS) // 2 and outcomes["works"] > len(NUMBERS) // 10
    assert kinds == {*hostile.KINDS, "whitespace_pattern"}
