"""Query parameters, as strict as bodies: what nobody reads is refused by its name."""

from collections.abc import Collection, Mapping

from starlette.requests import Request

from duetto.server.http.errors import cut, invalid

# Which version of an API a client speaks, as anthropic's and Azure's write it behind every path.
_LABELS = frozenset(("beta", "api-version"))


def query_of(request: Request, names: Collection[str] = ()) -> Mapping[str, str]:
    """The parameters of these names. Raises ApiError 400 for any other, and for one twice."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        shown = cut(name)
        if name in _LABELS:
            continue
        if name not in names:
            words = (
                f"is not supported in a query of this route; accepted: {', '.join(names) or 'none'}"
            )
            if request.method == "POST":
                words = "is not supported in a query: fields belong into the body"
            raise invalid(shown, words)
        if name in found:
            raise invalid(shown, "is there twice")
        found[name] = value
    return found


def number_of(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    """A whole number from 1 to `most`. Raises ApiError 400, naming it."""
    value = query.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and 1 <= int(value[:9]) <= most):
        raise invalid(name, f"must be from 1 to {most}")
    return int(value)
