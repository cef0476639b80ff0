"""Documents are executed: README's commands parse, its Python runs, its links exist."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from duetto.build import build
from duetto.cli.app import app
from duetto.core.engine_args import EngineArgs
from duetto.core.reuse_choice import ReuseRules, insisted
from duetto.demo import demo_model_dir
from duetto.engine.thread import in_thread
from duetto.server.app import create_app
from duetto.server.settings import ServerSettings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
API = ROOT / "docs" / "api.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    joined = "\n".join(blocks(path, "sh")).replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


ALL_COMMANDS = [(path, words) for path in DOCUMENTS for words in commands(path)]


@pytest.mark.parametrize(
    ("path", "words"), ALL_COMMANDS, ids=[" ".join(words) for _, words in ALL_COMMANDS]
)
def test_every_command_in_the_documents_exists(path, words):
    if words[0] == "make":
        assert words[1] in TARGETS
    elif words[0] == "duetto":
        # Binds every flag and argument as running would, without running.
        app.parse_args(words[1:], exit_on_error=False, print_error=False)
    else:
        assert words[0] in {"curl", "python", "git", "pip"}, f"{path}: {words}"


def runnable(words: list[str]) -> bool:
    """Commands of the README that end by themselves and write nothing into the checkout."""
    return words[0] == "duetto" and words[1] in {"chat", "complete", "tokenize", "doctor"}


@pytest.mark.parametrize("words", [*filter(runnable, commands(README))], ids=" ".join)
def test_the_readme_commands_run(words, tiny_model):
    given = [str(tiny_model) if word == "path/to/checkpoint" else word for word in words[1:]]
    command = [sys.executable, "-m", "duetto", *given]
    run = subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_readme_asks_for_the_model_that_it_has_just_served():
    serve, *_ = (words for words in commands(README) if words[:2] == ["duetto", "serve"])
    assert len(serve) == 2  # no model named, so the reader, under the name of its directory
    (curl,) = (words for words in commands(README) if words[0] == "curl")
    assert json.loads(curl[-1])["model"] == demo_model_dir().name


def test_the_readme_names_every_make_target():
    mentioned = {words[1] for words in commands(README) if words[0] == "make"}
    assert TARGETS - mentioned <= {"setup", "serve", "clean", "help"}


def test_the_readme_python_runs(tiny_model):
    for code in blocks(README, "python"):
        runnable = code.replace("path/to/checkpoint", str(tiny_model))
        subprocess.run([sys.executable, "-W", "error", "-c", runnable], check=True)


def test_the_api_pages_python_runs():
    structured, code = blocks(API, "python")
    subprocess.run([sys.executable, "-W", "error", "-c", structured], check=True)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    counts, answer = run.stdout.strip().split("\n")
    assert re.fullmatch(r"[1-9]\d* tokens were reused, 8 of the segments computed", counts)
    assert answer.strip() == "Gilcross"


def test_the_api_pages_bodies_are_answered():
    built = build(demo_model_dir(), EngineArgs())
    served = create_app(
        open_engine=in_thread(built.engine),
        codec=built.codec,
        config=built.scheduler_config,
        settings=ServerSettings(
            served_model_name=demo_model_dir().name, reuse=ReuseRules(why_not=insisted)
        ),
    )
    completion, chat = map(json.loads, blocks(API, "json"))
    with TestClient(served) as client:
        for path, body in (("/v1/completions", completion), ("/v1/chat/completions", chat)):
            reply = client.post(path, json=body)
            assert reply.status_code == 200, reply.text
            (choice,) = reply.json()["choices"]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert text.strip() == "Gilcross"
            told = reply.json()["timings"]["reuse"]
            assert told["reused"] > 0
            assert all(f"| `{key}` |" in API.read_text() for key in told)


def test_the_demo_runs(tiny_model):
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), str(tiny_model)],
        check=True,
        capture_output=True,
        text=True,
    )
    answers = re.findall(
        r"TTFT [\d.]+ ms, median ITL [\d.]+ ms, (\d+) prompt.*?(\d+) cached", run.stdout
    )
    assert len(answers) == 2
    assert answers[0][1] == "0"
    assert int(answers[1][1]) > 0  # the conversation's beginning was reused


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_command_line_reference_is_current():
    tool = ROOT / "tools" / "cli_reference.py"
    subprocess.run([sys.executable, str(tool), "--check"], check=True, cwd=ROOT)


def test_no_path_of_a_machine_is_committed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        text = (ROOT / name).read_bytes()
        assert str(ROOT).encode() + b"/" not in text, name


def test_the_changelog_knows_the_version():
    from duetto import __version__  # noqa: PLC0415

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
