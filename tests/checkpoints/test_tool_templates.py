"""Tools, calls and their results reach each family's template as it takes them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints.tool_templates import (
    CALL,
    CONVERSATION,
    DEEPSEEK,
    FAMILIES,
    HERMES,
    MISTRAL,
    NEEDS_A_LIST,
    NEEDS_ABSENCE,
    PYTHONIC,
    THINKING,
    TOOL,
    TOOL_JSON,
    WITHOUT_TOOLS,
)

from duetto.checkpoints.chat_template import ChatTemplate
from duetto.core.errors import InvalidRequest
from duetto.core.text import opens_thinking

FILE = Path("model/chat_template.jinja")
USER, CALLED, RESULT = CONVERSATION
_loaded: dict[str, ChatTemplate] = {}


def template_of(source: str) -> ChatTemplate:
    """Loaded once: each has a process of its own."""
    if source not in _loaded:
        _loaded[source] = ChatTemplate(source, FILE)
    return _loaded[source]


def refused(template: ChatTemplate, messages: Any = CONVERSATION, **kwargs: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        template.render(messages, **{"tools": [TOOL], **kwargs})
    return caught.value


def with_arguments(arguments: Any) -> list[dict[str, Any]]:
    call = {**CALL, "function": {"name": "look_up", "arguments": arguments}}
    return [USER, {**CALLED, "tool_calls": [call]}, RESULT]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_with_calls(name: str) -> None:
    source, expected = FAMILIES[name]
    template = template_of(source)
    assert template.note is None
    before = copy.deepcopy(CONVERSATION)
    assert template.render(CONVERSATION, tools=[TOOL]) == expected
    assert before == CONVERSATION
    facts = template.facts()
    assert "tools" in facts.reads and facts.shows_calls and facts.source == source


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_that_says_nothing_is_one_without_content(name: str) -> None:
    """Clients write null, "" or no key at all."""
    source, expected = FAMILIES[name]
    without = {key: value for key, value in CALLED.items() if key != "content"}
    for called in ({**CALLED, "content": ""}, {**CALLED, "content": []}, without):
        assert template_of(source).render([USER, called, RESULT], tools=[TOOL]) == expected


@pytest.mark.parametrize("source", [NEEDS_A_LIST, NEEDS_ABSENCE])
def test_a_template_that_fails_on_none_has_no_tools_in_another_way(source: str) -> None:
    template = template_of(source)
    expected = "<sys>\n<user>Define sea.\n<assistant>"
    assert template.note is None
    assert template.render([USER]) == template.render([USER], tools=[]) == expected


def test_arguments_may_be_an_object_and_none_are_an_empty_one() -> None:
    object_wanted, text_wanted = template_of(PYTHONIC), template_of(DEEPSEEK)
    given = with_arguments({"word": "é", "top": 2})
    assert 'look_up(word="é", top=2)' in object_wanted.render(given, tools=[TOOL])
    assert '\n{"word": "é", "top": 2}\n' in text_wanted.render(given, tools=[TOOL])
    spaced = with_arguments('{"word":"sea"  }')  # as the model wrote it
    assert '\n{"word":"sea"  }\n' in text_wanted.render(spaced, tools=[TOOL])
    for nothing in (None, "", "{}", {}):
        assert "look_up()" in object_wanted.render(with_arguments(nothing), tools=[TOOL])
        assert "\n{}\n" in text_wanted.render(with_arguments(nothing), tools=[TOOL])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("[1]", "this is [1]"),
        ("5", "this is 5"),
        ('"a"', "this is 'a'"),
        ('{"a": ', "Expecting value"),
        ('{"a": NaN}', "NaN is no JSON"),
        ("[" * 100_000, "nested too deep"),
        (["a"], "this is ['a']"),
        (5, "this is 5"),
        ('{"a": 1' + "0" * 30 + "}", "too large"),
        ('{"a":' * 20 + "1" + "}" * 20, "nested more than 16 deep"),
    ],
)
def test_arguments_that_are_no_object_are_named(arguments: Any, words: str) -> None:
    error = refused(template_of(HERMES), with_arguments(arguments))
    assert error.field == "messages[1].tool_calls[0].function.arguments"
    assert words in error.message


def call(**changes: Any) -> dict[str, Any]:
    return {**CALLED, "tool_calls": [{**CALL, **changes}]}


def result(**changes: Any) -> dict[str, Any]:
    return {**RESULT, **changes}


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([USER, RESULT], "messages[1].tool_call_id"),  # without its call
        ([USER, RESULT, CALLED], "messages[1].tool_call_id"),
        ([USER, CALLED, result(tool_call_id="call_2")], "messages[2].tool_call_id"),
        ([USER, CALLED, result(tool_call_id=None)], "messages[2].tool_call_id"),
        ([USER, CALLED, result(tool_call_id="")], "messages[2].tool_call_id"),
        ([USER, CALLED, result(tool_call_id=5)], "messages[2].tool_call_id"),
        ([USER, CALLED, RESULT, RESULT], "messages[3].tool_call_id"),  # a second one
        ([USER, CALLED, result(content=None)], "messages[2].content"),
        ([USER, CALLED, result(content={"a": 1})], "messages[2].content"),
        ([USER, call(id=None)], "messages[1].tool_calls[0].id"),
        ([USER, call(id="")], "messages[1].tool_calls[0].id"),
        ([USER, call(type="custom")], "messages[1].tool_calls[0].type"),
        ([USER, call(function=None)], "messages[1].tool_calls[0].function"),
        ([USER, call(function={"arguments": "{}"})], "messages[1].tool_calls[0].function.name"),
        ([USER, {**CALLED, "tool_calls": [CALL, CALL]}], "messages[1].tool_calls[1].id"),
        ([USER, {**CALLED, "tool_calls": "x"}], "messages[1].tool_calls"),
        ([USER, {**CALLED, "tool_calls": ["x"]}], "messages[1].tool_calls[0]"),
        ([{**USER, "tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content"),
        ([USER, {**CALLED, "tool_calls": []}], "messages[1].content"),
        ([{**USER, "reasoning": "x"}], "messages[0].reasoning"),
        ([USER, {**CALLED, "reasoning_content": 5}], "messages[1].reasoning_content"),
        ([USER, {**CALLED, "reasoning_content": "a", "reasoning": "b"}], "messages[1].reasoning"),
    ],
)
def test_what_is_wrong_with_calls_is_named(messages: Any, field: str) -> None:
    assert refused(template_of(HERMES), messages).field == field


def test_a_call_may_stay_without_result_and_its_id_may_come_again() -> None:
    template = template_of(HERMES)
    assert template.render([USER, CALLED, USER], tools=[TOOL]).count("<tool_call>") == 1
    again = [USER, CALLED, RESULT, USER, CALLED, RESULT]
    assert template.render(again, tools=[TOOL]).count("<tool>Water.") == 2
    assert "<tool_call>" in template.render(CONVERSATION)  # tools that are not there any more


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ("look_up", "tools"),
        ({"a": 1}, "tools"),
        (["look_up"], "tools[0]"),
        ([{"function": TOOL["function"]}], "tools[0].type"),
        ([{"type": "web_search"}], "tools[0].type"),
        ([TOOL, {"type": "function"}], "tools[1].function"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "a" * 65}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "é"}}], "tools[0].function.name"),
        ([TOOL, TOOL], "tools[1].function.name"),
        (
            [{"type": "function", "function": {"name": "a", "description": 5}}],
            "tools[0].function.description",
        ),
        (
            [{"type": "function", "function": {"name": "a", "parameters": []}}],
            "tools[0].function.parameters",
        ),
        ([{**TOOL, "other": object()}], "tools[0]"),
        ([{**TOOL, "other": float("inf")}], "tools[0]"),
        ([{**TOOL, "other": [0] * 200_001}], "tools[0]"),
    ],
)
def test_what_is_wrong_with_tools_is_named(tools: Any, field: str) -> None:
    assert refused(template_of(HERMES), [USER], tools=tools).field == field


def test_deep_tools_are_refused_and_deep_schemas_are_not() -> None:
    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(depth):
            schema = {"type": "object", "properties": {"x": schema}}
        return {"type": "function", "function": {"name": "a", "parameters": schema}}

    template = template_of(HERMES)
    assert template.render([USER], tools=[nested(20)]).count("properties") == 20
    assert refused(template, [USER], tools=[nested(100)]).field == "tools[0]"


def test_a_template_sees_what_tells_of_the_tool() -> None:
    """Not null, nor what is said of the answer; what is not said of parameters is that of none."""
    function = {"name": "now", "description": None, "strict": True}
    text = template_of(HERMES).render([USER], tools=[{"type": "function", "function": function}])
    shown = json.loads(text.split("\n")[0].removeprefix("<sys>"))
    assert shown == {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
    }


def test_tools_for_a_template_that_shows_none() -> None:
    asks_only = WITHOUT_TOOLS + "{% if tools %}{% endif %}"
    for source in (WITHOUT_TOOLS, asks_only):
        template = template_of(source)
        error = refused(template, [USER])
        assert error.field == "tools"
        assert "leave them out" in error.message and "--chat-template" in error.message
        assert "tools" not in template.facts().reads


def test_calls_for_a_template_that_leaves_them_out() -> None:
    template = template_of(WITHOUT_TOOLS)
    error = refused(template, CONVERSATION, tools=())
    assert error.field == "messages[1].tool_calls"
    assert "leaves calls out" in error.message
    assert not template.facts().shows_calls


def test_calls_for_a_template_that_leaves_them_out_beside_a_text() -> None:
    said = [USER, {**CALLED, "content": "I look."}, RESULT]
    assert "I look." in template_of(HERMES).render(said, tools=[TOOL])
    error = refused(template_of(DEEPSEEK), said)
    assert error.field == "messages[1].content"


def test_a_template_that_raises_over_tools() -> None:
    needs = "{% if tools and not tools[0].function.description %}"
    template = template_of(needs + "{{ raise_exception('describe it') }}{% endif %}" + HERMES)
    bare = {"type": "function", "function": {"name": "a"}}
    error = refused(template, [USER], tools=[bare])
    assert (error.field, error.message) == ("tools", "describe it")
    fails = template_of("{% if tools %}{{ 'a' + tools[0].function.at }}{% endif %}" + HERMES)
    assert refused(fails, [USER], tools=[bare]).field == "tools"
    # The messages' fault stays theirs.
    error = refused(
        template_of(
            "{% for m in messages %}{{ 1 / (m.content | length) }}{% endfor %}{{ tools | tojson }}"
        ),
        [{"role": "user", "content": ""}],
    )
    assert error.field == "messages"


def test_ids_are_short_where_they_must_be() -> None:
    template = template_of(MISTRAL)
    short = [USER, call(id="abcDEF123"), result(tool_call_id="abcDEF123")]
    assert template.render(short, tools=[TOOL]).count("abcDEF123") == 2
    assert "call_1" not in template.render(CONVERSATION, tools=[TOOL])


def test_a_named_result_keeps_its_name() -> None:
    source, expected = FAMILIES["gemma"]
    named = [USER, CALLED, {**RESULT, "name": "other"}]
    assert template_of(source).render(named, tools=[TOOL]) == expected.replace(
        "response:look_up", "response:other"
    )


def test_reasoning_reaches_a_template_that_reads_it() -> None:
    template = template_of(THINKING)
    for name in ("reasoning_content", "reasoning"):
        said = {"role": "assistant", "content": "Yes.", name: "Hm."}
        text = template.render([USER, said, USER])
        assert text.splitlines()[1] == "<assistant><think>Hm.</think>Yes.<end>"
    only = {"role": "assistant", "content": None, "reasoning_content": "Hm."}
    assert "<think>Hm.</think><end>" in template.render([USER, only, USER])
    assert template.facts().shows_reasoning and not template_of(HERMES).facts().shows_reasoning
    spoken = template_of(THINKING.replace("reasoning_content", "thinking"))
    assert "<think>Hm.</think>" in spoken.render([USER, only, USER])
    said = [USER, {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}, USER]
    assert "Hm." not in template_of(WITHOUT_TOOLS).render(said)  # as its family has it


def test_how_answers_begin() -> None:
    thinking = template_of(THINKING).facts()
    assert thinking.generation_prompt == "<assistant>\n<think>\n" and thinking.opens_think
    assert thinking.reads == {"enable_thinking"}
    text = template_of(THINKING).render([USER], template_kwargs={"enable_thinking": False})
    assert not opens_thinking(text)
    assert template_of(DEEPSEEK).facts().opens_think
    hermes = template_of(HERMES).facts()
    assert hermes.generation_prompt == "<assistant>" and not hermes.opens_think
    broken = ChatTemplate("{{ messages[0].nothing.more }}", FILE).facts()
    assert broken.generation_prompt is None and not broken.opens_think


def test_another_template_is_taken_for_tools() -> None:
    both = ChatTemplate(WITHOUT_TOOLS, FILE, for_tools=template_of(HERMES))
    assert both.render([USER]) == "<user>Define sea.<end>\n<assistant>"
    assert both.render([USER], tools=[TOOL]).startswith(f"<sys>{TOOL_JSON}\n")
    assert both.facts().source == WITHOUT_TOOLS
    assert both.facts(with_tools=True).source == HERMES
    error = refused(both, CONVERSATION, tools=())
    assert error.field == "messages[1].tool_calls"


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "hermes that needs no name"])
def test_tools_are_rendered_as_by_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import (  # noqa: PLC0415  an extra
        render_jinja_template,
    )

    source, _ = FAMILIES[name]
    arguments = {"word": "sea", "top": 2}
    messages = with_arguments(json.dumps(arguments) if name == "deepseek" else arguments)
    if name == "mistral":
        messages[1]["tool_calls"][0]["id"] = "abcDEF123"
        messages[2] = result(tool_call_id="abcDEF123")
    ours = template_of(source).render(messages, tools=[TOOL])
    if name == "pythonic":  # transformers prints the content that is not there
        messages[1]["content"] = ""
    if name == "gemma":
        for message in (messages[0], messages[2]):
            message["content"] = [{"type": "text", "text": message["content"]}]
        messages[2]["name"] = "look_up"
    theirs, _ = render_jinja_template(
        [messages], chat_template=source, tools=[TOOL], add_generation_prompt=True
    )
    assert ours == theirs[0]
