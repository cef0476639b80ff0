"""Templates render as transformers renders them, and can do no harm."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from duetto.checkpoints import chat_template
from duetto.checkpoints.chat_template import ChatTemplate
from duetto.checkpoints.json_file import JsonSection
from duetto.checkpoints.template_files import load_chat_template
from duetto.core.errors import CheckpointError, InvalidRequest

FILE = Path("model/chat_template.jinja")
USER = {"role": "user", "content": "Hi <b>"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Yes?"}

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""
TEMPLATES = {
    "chatml": CHATML,
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
        "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant!') }}{% endif %}"
        "{% if loop.index0 == 0 %}{% set content = system + m['content'] %}"
        "{% else %}{% set content = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "macros, tojson, loop controls, namespaces": (
        "{%- macro shown(x) %}{{ x | tojson }}{% endmacro %}\n"
        "{%- set ns = namespace(n=0) %}\n"
        "{%- for m in messages -%}\n"
        "  {%- if m.role == 'system' %}{% continue %}{% endif -%}\n"
        "  {%- set ns.n = ns.n + 1 %}{{ ns.n }}:{{ shown({'é': m.content, 'a': [1, none]}) }}\n"
        "{% if ns.n > 3 %}{% break %}{% endif %}\n"
        "{%- endfor %}\n"
        "{{ messages | tojson(indent=2) }}{{ tools is none }}{{ undefined_thing is defined }}"
    ),
    "generation marks": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
}


def refused(template: ChatTemplate, messages: Any, **kwargs: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        template.render(messages, **kwargs)
    return caught.value


def test_chatml() -> None:
    template = ChatTemplate(CHATML, FILE)
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n"
    # trim_blocks and lstrip_blocks: lines that only hold a tag leave nothing; printed lines end.
    head = head.replace("<|im_end|>\n", "<|im_end|>\n\n")
    assert template.render([SYSTEM, USER], add_generation_prompt=False) == head
    assert template.render([SYSTEM, USER]) == head + "<|im_start|>assistant\n\n"


def test_parts_are_joined_by_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    template = ChatTemplate("{{ messages[0].content }}", FILE)
    assert template.render([{"role": "user", "content": parts}]) == "a\nb"
    assert template.render([{"role": "user", "content": []}]) == ""


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ("hi", "messages"),
        ([], "messages"),
        ({"role": "user"}, "messages"),
        (["hi"], "messages[0]"),
        ([USER, {"content": "x"}], "messages[1].role"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content"),
        ([{"role": "user", "content": "\ud83d"}], "messages"),
        ([{"role": "user", "content": "x", "name": Path()}], "messages[0]"),
    ],
)
def test_malformed_messages_are_refused_by_field(messages: Any, field: str) -> None:
    assert refused(ChatTemplate(CHATML, FILE), messages).field == field


def test_deep_data_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(100):
        deep = [deep]
    error = refused(ChatTemplate(CHATML, FILE), [{**USER, "name": deep}])
    assert "nested more than 16 deep" in error.message


def test_the_words_of_a_template_that_refuses() -> None:
    template = ChatTemplate(TEMPLATES["llama 2"], FILE, {"bos_token": "<s>", "eos_token": "</s>"})
    error = refused(template, [USER, USER])
    assert (error.field, error.message) == ("messages", "Roles must alternate user/assistant!")
    assert template.render([USER]) == "<s>[INST] Hi <b> [/INST]"  # and it goes on


def test_a_template_may_refuse_a_lone_user_message() -> None:
    source = "{% if messages|length < 2 %}{{ raise_exception('too few') }}{% endif %}ok"
    assert ChatTemplate(source, FILE).render([USER, ANSWER]) == "ok"


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ ", "{% unknown_tag %}", "{{ x|no_such_filter }}", "{% generation %}{{ 1 }}"],
)
def test_a_template_that_does_not_compile_ends_start_up(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: the chat template does not"):
        ChatTemplate(source, FILE)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.more }}",
        "{{ 'a' + 1 }}",
        "{{ 1 / 0 }}",
        "{{ no_such_function() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # out of the sandbox
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_always_fails_is_told_at_start_and_refuses_chats(source: str) -> None:
    template = ChatTemplate(source, FILE)
    assert template.note is not None
    assert template.note.startswith("on one user message, the chat template fails: ")
    assert "\n" not in template.note
    error = refused(template, [USER])
    assert error.field == "messages"
    assert "the chat template fails: " in error.message


@pytest.mark.parametrize(
    ("source", "lacks", "given"),
    [
        ("{{ 'Tools: ' + functions }}", "functions", "[]"),
        ("{{ 'Tools: ' + functions }}", "functions", "a"),
        ("{% for f in functions.all %}{{ f.name }}{% endfor %}", "functions", {"all": [{}]}),
        ("{% for d in documents %}{{ d.title }}{% endfor %}", "documents", [{"title": "a"}]),
        ("{{ today.split('-')[0] }}", "today", "2026-01-02"),
        ("{{ 3 + depth }}", "depth", 4),
    ],
)
def test_a_chat_may_give_what_a_template_lacks(source: str, lacks: str, given: Any) -> None:
    template = ChatTemplate(source, FILE)
    assert lacks in (template.note or "")
    error = refused(template, [USER])
    assert error.field == "messages"
    assert f"chat_template_kwargs can give it {lacks}" in error.message
    template.render([USER], template_kwargs={lacks: given})


def test_documents_are_for_templates_that_read_them() -> None:
    source = "{% for d in documents or [] %}[{{ d.text }}]{% endfor %}{{ messages|length }}"
    template = ChatTemplate(source, FILE)
    assert template.render([USER], documents=[{"text": "a"}, {"text": "b"}]) == "[a][b]1"
    assert template.render([USER], documents=()) == "1"
    for wrong, field in (
        ([5], "documents[0]"),
        ([{"text": "a"}, "b"], "documents[1]"),
        ("ab", "documents"),
        ({"text": "a"}, "documents"),
        ([{"text": object()}], "documents"),
    ):
        assert refused(template, [USER], documents=wrong).field == field
    twice = {"documents": [{"text": "a"}]}
    assert refused(template, [USER], template_kwargs=twice, **twice).field == "documents"
    other = ChatTemplate("{{ messages|length }}", FILE)
    assert "reads none" in refused(other, [USER], **twice).message


def test_tools_are_no_argument_since_the_api_has_a_field_for_them() -> None:
    template = ChatTemplate("{{ 'Tools: ' + tools[0].function.name }}", FILE)
    assert "no tools are given" in refused(template, [USER]).message
    assert refused(template, [USER], template_kwargs={"tools": []}).field == "chat_template_kwargs"


def test_a_failure_on_other_messages_is_the_requests() -> None:
    template = ChatTemplate("{{ 1 / (2 - messages|length) }}", FILE)
    error = refused(template, [USER, USER])
    assert error.field == "messages"
    assert "the chat template fails: division by zero" in error.message


def test_output_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 1000)
    source = (
        "{% for m in messages %}{% for i in range(90000) %}{{ m.content }}{% endfor %}{% endfor %}"
    )
    template = ChatTemplate("{% if messages|length > 1 %}" + source + "{% endif %}", FILE)
    assert "more than 1000 characters" in refused(template, [USER, USER]).message


def test_arguments_are_those_that_the_template_reads() -> None:
    source = "{% if enable_thinking %}think{% endif %}{{ bos_token }}{{ messages|length }}"
    template = ChatTemplate(source, FILE, {"bos_token": "<s>"})
    assert template.render([USER], template_kwargs={"enable_thinking": True}) == "think<s>1"
    assert template.render([USER], template_kwargs={"enable_thinking": False}) == "<s>1"
    ours = ["tokenize", "chat_template", "messages", "bos_token", "tools", "raise_exception"]
    for name in [*ours, "add_generation_prompt", "self", "effort"]:
        error = refused(template, [USER], template_kwargs={name: True})
        assert error.field == "chat_template_kwargs"
        assert error.message.endswith("accepted: enable_thinking")
    for value in (object(), {"a": {1, 2}}, float("nan"), 10**30, [0] * 200_001):
        error = refused(template, [USER], template_kwargs={"enable_thinking": value})
        assert error.field == "chat_template_kwargs"
    assert refused(template, [USER], template_kwargs=["x"]).field == "chat_template_kwargs"


def test_callers_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    before = json.dumps(messages)
    ChatTemplate(CHATML, FILE).render(messages)
    assert json.dumps(messages) == before


def test_the_date_is_an_argument() -> None:
    template = ChatTemplate(
        "{{ strftime_now('%d %b %Y') }}", FILE, now=lambda: datetime(2026, 1, 2)
    )
    assert template.render([USER]) == "02 Jan 2026"


def config(**values: Any) -> JsonSection:
    return JsonSection(Path("tokenizer_config.json"), values)


def test_where_the_template_is_found(tmp_path: Path) -> None:
    def shown(section: JsonSection | None) -> str | None:
        template = load_chat_template(tmp_path, section, {})
        return template and template.render([USER])

    def named(*names: str) -> Sequence[dict[str, str]]:
        return [{"name": name, "template": name} for name in names]

    assert shown(None) is None
    assert shown(config()) is None
    assert shown(config(chat_template="a")) == "a"
    assert shown(config(chat_template=named("rag", "default"))) == "default"
    assert shown(config(chat_template=named("only"))) == "only"
    for bad in (named("a", "b"), [{"name": "x"}], ["x"], 3, []):
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template"):
            shown(config(chat_template=bad))
    (tmp_path / "chat_template.jinja").write_text("file")
    assert shown(config(chat_template="a")) == "file"


def test_which_template_is_for_tools(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "t"}}

    def shown(section: JsonSection | None, instead: Path | None = None) -> list[str]:
        template = load_chat_template(tmp_path, section, {}, instead)
        assert template is not None
        return [template.render([USER], tools=given) for given in ([], [tool])]

    def named(*names: str) -> JsonSection:
        source = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
        templates = [{"name": name, "template": name[0] + source} for name in names]
        return config(chat_template=templates)

    assert shown(named("default", "tool_use")) == ["d", "tt"]
    assert shown(named("default", "rag")) == ["d", "dt"]
    assert shown(named("tool_use")) == ["t", "tt"]
    with pytest.raises(CheckpointError, match="none of rag, tool_use is named"):
        shown(named("rag", "tool_use"))
    given = tmp_path / "given.jinja"
    given.write_text("G{{ tools }}")
    (tmp_path / "chat_template.jinja").write_text("file{{ tools }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T{{ tools }}")
    assert [text[:4] for text in shown(named("default"))] == ["file", "T[{'"]
    assert [text[:2] for text in shown(named("default"), given)] == ["GN", "G["]
    with pytest.raises(CheckpointError, match=r"nowhere\.jinja: is missing"):
        shown(None, tmp_path / "nowhere.jinja")


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import (  # noqa: PLC0415  an extra
        render_jinja_template,
    )

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate(TEMPLATES[name], FILE, tokens)
    for messages in ([USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER]):
        for prompt in (True, False):
            theirs, _ = render_jinja_template(
                [messages],
                chat_template=TEMPLATES[name],
                add_generation_prompt=prompt,
                **tokens,
            )
            assert template.render(messages, add_generation_prompt=prompt) == theirs[0]
