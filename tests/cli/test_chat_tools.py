"""`duetto chat --tools`: calls are shown, results typed, and both go back into the conversation."""

import json
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from cli.in_process import duetto

from duetto.core.outputs import CompletionOutput, RequestOutput
from duetto.dialects.answer import answer_parser
from duetto.dialects.choose import choose_dialects
from duetto.dialects.pieces import ToolSchema
from duetto.engine.read_answer import message_of

WEATHER = {"name": "weather", "description": "w", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Riga"}}\n</tool_call>'
CUT = '<tool_call>\n{"name": "weather", "arguments": {"ci'


class ScriptedLLM:
    """Says one text after another, in two parts each, in Hermes's way of calling."""

    def __init__(self, *texts: str, reason: str = "stop") -> None:
        self.texts = [*texts]
        self.reason = reason
        self.asked: list[list[dict]] = []
        self.tools: list[dict] = []

    def chat_prompt(self, messages, *, tools):
        self.tools = tools
        return {"prompt": ""}

    def stream_chat(self, messages, params, *, tools):
        assert tools == self.tools
        self.asked.append([*messages])
        calls, _ = choose_dialects(None, tool_call_parser="hermes")

        def make():
            return answer_parser(calls, None, [ToolSchema("weather")], is_open=False)

        text, parser = self.texts.pop(0), make()
        answer = CompletionOutput(index=0, text=text)
        for part in (text[:9], text[9:]):
            yield RequestOutput("r", None, [1], [answer]), parser.push(part)
        answer.message, answer.finish_reason = message_of(make(), text), self.reason
        yield RequestOutput("r", None, [1], [answer], finished=True), parser.finish()


@pytest.fixture
def tools_file(tmp_path: Path) -> Path:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    return file


def talk(llm: ScriptedLLM, file: Path, stdin: str):
    @contextmanager
    def opened(*_):
        yield llm

    with patch("duetto.cli.chat.open_llm", opened):
        return duetto("chat", "--tools", file, stdin=stdin)


def test_a_call_is_shown_and_its_typed_result_goes_back(tools_file: Path) -> None:
    llm = ScriptedLLM(f"Let me see. {CALL}", "Nine degrees.", "Bye.")
    run = talk(llm, tools_file, "how warm?\n9 C\nthanks\n")
    assert run.returncode == 0, run.stderr
    assert llm.tools == TOOLS
    assert 'Let me see.\nweather({"city": "Riga"})' in run.stdout
    assert "result of weather> " in run.stdout
    user, said, result = llm.asked[1]
    assert user == {"role": "user", "content": "how warm?"}
    (call,) = said["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Riga"}'}
    assert result == {"role": "tool", "tool_call_id": call["id"], "content": "9 C"}
    assert llm.asked[2][3:] == [
        {"role": "assistant", "content": "Nine degrees."},
        {"role": "user", "content": "thanks"},
    ]


def test_an_empty_line_declines_each_call(tools_file: Path) -> None:
    llm = ScriptedLLM(f"{CALL}\n{CALL}", "Then not.")
    assert talk(llm, tools_file, "how warm?\n\n\n").returncode == 0
    contents = [message["content"] for message in llm.asked[1] if message["role"] == "tool"]
    assert contents == ["The user declined this call."] * 2


def test_the_end_of_input_instead_of_a_result_leaves(tools_file: Path) -> None:
    llm = ScriptedLLM(CALL)
    assert talk(llm, tools_file, "how warm?\n").returncode == 0
    assert len(llm.asked) == 1


def test_a_call_that_was_cut_off_is_forgotten(tools_file: Path) -> None:
    llm = ScriptedLLM(f"Well. {CUT}", "Yes.", reason="length")
    run = talk(llm, tools_file, "how warm?\nand?\n")
    assert "a call was cut off by --max-tokens" in run.stderr and "…" in run.stdout
    assert llm.asked[1][1] == {"role": "assistant", "content": "Well."}


def test_what_was_said_of_an_interrupted_answer_stays_without_its_calls(tools_file: Path) -> None:
    llm = ScriptedLLM(f"Well. {CALL}", "Yes.", reason="abort")
    run = talk(llm, tools_file, "how warm?\nand?\n")
    assert "what was said so far stays" in run.stderr
    assert llm.asked[1][1:] == [
        {"role": "assistant", "content": "Well."},
        {"role": "user", "content": "and?"},
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON in UTF-8"),
        ("[]", "defines none"),
        ("{}", "tools: Expected array, got object"),
        ('[{"type": "web_search"}]', "tools[0].type: 'web_search' is not supported"),
        ('[{"type": "function", "function": {}}]', "tools[0].function.name: is required"),
        (json.dumps([*TOOLS, *TOOLS]), "tools[1].function.name: 'weather' is there twice"),
    ],
)
def test_a_file_that_defines_no_tools_is_named(tools_file: Path, text: str, words: str) -> None:
    tools_file.write_text(text)
    run = duetto("chat", "--tools", tools_file, "no/such/model")
    assert run.returncode == 1 and len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("duetto: --tools: ") and words in run.stderr


def test_what_cannot_have_tools_says_so(tools_file: Path, tmp_path: Path) -> None:
    run = duetto("chat", "--tools", tools_file)  # the demo's template shows none
    assert run.returncode == 1 and "tools: " in run.stderr
    run = duetto("chat", "--tools", tools_file, "-q", "hi")
    assert run.returncode == 1 and "--tools: not with --quick" in run.stderr
    run = duetto("chat", "--tools", tmp_path / "none.json")
    assert run.returncode == 1 and "none.json cannot be read" in run.stderr
