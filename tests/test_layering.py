"""Who may import whom: the imports as they stand are compared with the house's table."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "duetto"
PAGE = ROOT.parent.parent / "docs" / "structure.md"


def table_of_the_page() -> dict[str, set[str]]:
    """Who may import whom, as docs/structure.md says."""
    allowed: dict[str, set[str]] = {}
    for row in re.findall(r"^\| (`.*)\|$", PAGE.read_text(), re.MULTILINE):
        rooms, *_, may_import = row.split("|")
        if not may_import.strip():
            continue
        for room in re.findall(r"`(\w+)`", rooms):
            allowed[room] = set(re.findall(r"\w+", may_import))
    everything = set(allowed)
    return {room: everything if "everything" in may else may for room, may in allowed.items()}


MAY_IMPORT = table_of_the_page() | {
    "__main__": {"cli"},
    "__init__": {"core", "llm"},  # for types; at run time each name loads when it is first used
}
STANDARD_LIBRARY_ONLY = {"core", "scheduler", "engine", "program", "dialects"}
HEAVY = {"torch", "transformers", "ray"}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache  # several tests look at every file
def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


GPU = (
    ROOT / "backends" / "cuda"
)  # an extra: nothing else may import it but by name, when it is used
FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    room = room_of(path)
    modules = imported_modules(path)
    ours = {m.split(".")[1] for m in modules if m.startswith("duetto.")}
    allowed = MAY_IMPORT[room] | {room, "_native"}
    assert ours <= allowed, f"{room} may import {sorted(allowed)}"
    if room not in {"cli", "__main__"}:
        assert "duetto" not in modules, "the public names are for users: import from the room"
    outside = {m.split(".")[0] for m in modules} - {"duetto"}
    heavy = HEAVY - {"torch"} if GPU in path.parents else HEAVY
    assert not outside & heavy, "torch, transformers and ray are never imported by the product"
    if room in STANDARD_LIBRARY_ONLY:
        assert outside <= sys.stdlib_module_names, f"{room} is standard library only"


def test_the_page_names_every_room():
    assert {room_of(path) for path in FILES} <= set(MAY_IMPORT)
    assert MAY_IMPORT["core"] == set()  # the table was read, and means what it says
    assert MAY_IMPORT["server"] == {"core", "engine", "dialects"}


@pytest.mark.parametrize(
    "code",
    [
        "import duetto",
        "import duetto; duetto.LLM",
        "import duetto.scheduler.scheduler, duetto.engine.engine",
        "import sys; sys.argv = ['duetto', '--help']; from duetto.cli.app import app;"
        " app(['--help'], exit_on_error=False, result_action='return_value')",
    ],
)
def test_nothing_heavy_is_loaded(code):
    check = f"{code}\nimport sys\nloaded = {HEAVY!r} & set(sys.modules)\nassert not loaded, loaded"
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


def test_importing_duetto_loads_nothing_else():
    check = "import sys, duetto; assert 'numpy' not in sys.modules and 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_deciding_half_loads_no_arrays():
    check = (
        "import sys, duetto.engine.engine, duetto.engine.thread, duetto.program.program;"
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_nothing_is_unpickled():
    """Pickle is code from outside: no file of the product, its tools or benchmarks may load it."""
    banned = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
    for path in FILES:
        assert not banned & {m.split(".")[0] for m in imported_modules(path)}, path
