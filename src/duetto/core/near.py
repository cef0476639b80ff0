"""Which known name somebody may have meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def near_misses(name: str, known: Iterable[str]) -> str:
    """ "; did you mean a or b?", or nothing where no name is near."""
    folded = {each.lower(): each for each in known}
    found = [folded[each] for each in get_close_matches(name.lower()[:80], folded, 3, 0.6)]
    return f"; did you mean {' or '.join(found)}?" if found else ""
