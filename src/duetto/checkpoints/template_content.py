"""What a chat template takes as a message's content, by how its source reads it.

As in vLLM, a loop over the content means that it takes a list of parts. Content is followed through
names, namespaces, filters and arguments of macros. Runs in the template's own process: imports
jinja2, and nothing of Duetto.
"""

from collections.abc import Iterator
from typing import Literal

from jinja2 import nodes

Takes = Literal["string", "parts", "either"]

# What they return is the content's own parts, or is the content itself.
_PASSING_FILTERS = frozenset(
    ("list", "selectattr", "rejectattr", "select", "reject", "default", "d", "sort", "reverse")
)
_FILTERS_OF_PARTS = frozenset(("selectattr", "rejectattr", "map", "groupby"))


def content_taken(template: nodes.Template) -> Takes:
    """ "either" for a template that asks what it got."""
    reading = _Reading(template)
    if not any(reading.takes_parts(node) for node in template.find_all(nodes.Node)):
        return "string"
    tests = template.find_all(nodes.Test)
    asks = any(test.name == "string" and reading.is_content(test.node) for test in tests)
    return "either" if asks else "parts"


def keys_read(template: nodes.Template) -> set[str]:
    """The keys that it looks for in something: in a message, for one."""
    found = {node.attr for node in template.find_all(nodes.Getattr)}
    looked_up: list[nodes.Node] = [node.arg for node in template.find_all(nodes.Getitem)]
    for call in template.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr == "get":
            looked_up += call.args[:1]
    for compare in template.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compare.ops):
            looked_up.append(compare.expr)
    constants = [node.value for node in looked_up if isinstance(node, nodes.Const)]
    return found | {value for value in constants if isinstance(value, str)}


class _Reading:
    """Which expressions of a template are the content of a message.

    Names are taken for the same in all scopes: templates call nothing else `content`.
    """

    def __init__(self, template: nodes.Template) -> None:
        self._names: set[str] = set()  # "x", or "space.x" for an attribute of a namespace
        bindings = list(_bindings(template))
        found = -1
        while found < len(self._names):  # a name may be bound before the name that it is bound to
            found = len(self._names)
            self._names |= {name for name, value in bindings if self.is_content(value)}

    def is_content(self, node: nodes.Node | None) -> bool:
        match node:
            case nodes.Name():
                return node.name in self._names
            case nodes.Getattr():
                return node.attr == "content" or _dotted(node) in self._names
            case nodes.Getitem(arg=nodes.Slice()):
                return self.is_content(node.node)
            case nodes.Getitem(arg=nodes.Const(value=key)):
                return bool(key == "content")
            case nodes.Call(node=nodes.Getattr(attr="get"), args=[nodes.Const(value=key), *_]):
                return bool(key == "content")
            case nodes.Filter():
                return node.name in _PASSING_FILTERS and self.is_content(node.node)
            case nodes.CondExpr():
                return self.is_content(node.expr1) or self.is_content(node.expr2)
            case nodes.And() | nodes.Or():
                return self.is_content(node.left) or self.is_content(node.right)
        return False

    def takes_parts(self, node: nodes.Node) -> bool:
        """A loop over the content, a filter that looks into parts, or the text of one of them."""
        match node:
            case nodes.For():
                return self.is_content(node.iter)
            case nodes.Filter():
                return node.name in _FILTERS_OF_PARTS and self.is_content(node.node)
            case nodes.Getattr(attr="text" | "type"):
                return self._is_part(node.node)
            case nodes.Getitem(arg=nodes.Const(value="text" | "type")):
                return self._is_part(node.node)
        return False

    def _is_part(self, node: nodes.Node) -> bool:
        match node:
            case nodes.Getitem(arg=nodes.Const(value=index)):
                return isinstance(index, int) and self.is_content(node.node)
            case nodes.Filter(name="first" | "last"):
                return self.is_content(node.node)
        return False


def _bindings(template: nodes.Template) -> Iterator[tuple[str, nodes.Node]]:
    """Each name that the template sets, with the expression it is set to."""
    for assign in template.find_all(nodes.Assign):
        yield from _bound(assign.target, assign.node)
    for block in template.find_all(nodes.With):
        for target, value in zip(block.targets, block.values, strict=True):
            yield from _bound(target, value)
    macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
    for call in template.find_all(nodes.Call):
        macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is not None:
            yield from (
                (arg.name, value) for arg, value in zip(macro.args, call.args, strict=False)
            )
            yield from ((keyword.key, keyword.value) for keyword in call.kwargs)


def _bound(target: nodes.Node, value: nodes.Node) -> Iterator[tuple[str, nodes.Node]]:
    match target:
        case nodes.Name():
            yield target.name, value
        case nodes.NSRef():
            yield f"{target.name}.{target.attr}", value
        case nodes.Tuple():
            if isinstance(value, nodes.Tuple):
                for each, its in zip(target.items, value.items, strict=False):
                    yield from _bound(each, its)


def _dotted(node: nodes.Getattr) -> str:
    return f"{node.node.name}.{node.attr}" if isinstance(node.node, nodes.Name) else ""
