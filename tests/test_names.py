"""One noun, one thing: no two modules give a public class, or a type, the same name."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import duetto

ROOT = Path(duetto.__file__).parent
# What may be defined in several modules, and why.
ALLOWED = {
    "program": "each file in models/ gives its own: config -> Program",
    "main": "where a process begins",
    "variants": "each kernel of the GPU says what it is compiled for",
}
COMMANDS = "cli"  # a command's function is called as its user types it


def public_names(path: Path) -> Iterator[str]:
    """Classes, functions and type aliases of a module. A constant, in capitals, may repeat."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [t.id for t in node.targets if isinstance(t, ast.Name) and not t.id.isupper()]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def test_a_name_is_defined_once() -> None:
    defined: dict[str, list[str]] = defaultdict(list)
    for path in sorted(ROOT.rglob("*.py")):
        module = str(path.relative_to(ROOT))
        for name in public_names(path):
            is_command = module.startswith(COMMANDS) and not name[0].isupper()
            if not is_command and name not in {*ALLOWED, "logger"}:
                defined[name].append(module)
    assert len(defined) > 500  # they were read
    assert {name: where for name, where in defined.items() if len(where) > 1} == {}


def test_what_is_allowed_is_needed() -> None:
    seen = defaultdict(int)
    for path in ROOT.rglob("*.py"):
        for name in set(public_names(path)):
            seen[name] += 1
    assert all(seen[name] > 1 for name in ALLOWED), "an exception that nothing needs any more"
