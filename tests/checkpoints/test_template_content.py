"""Each role's content reaches a template as that template takes it. Templates are in the style of
published ones, shortened."""

from pathlib import Path

import pytest

from duetto.checkpoints.chat_template import ChatTemplate

TEXT = "Hi there"
PARTS = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
LINES = "Hi \nthere"  # what becomes of them where a string is taken
LOOP = "{% for c in message.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"


def of_messages(body: str) -> str:
    return "{% for message in messages %}<{{ message.role }}>" + body + "{% endfor %}"


TAKES_STRINGS = {
    "chatml": of_messages("{{ message['content'] }}"),
    "llama 3": of_messages(
        "{% set content = '[' + message['content'] | trim + ']' %}{{ content }}"
    ),
    "deepseek: namespace": (
        "{% set ns = namespace(text='') %}"
        + of_messages("{% set ns.text = message['content'] %}{{ ns.text + '|' }}")
    ),
    "qwen 3: strings or nothing": of_messages(
        "{% if message.content is string %}{% set content = message.content %}{% else %}"
        "{% set content = '' %}{% endif %}{{ content }}"
    ),
    "phi: lines of a string": of_messages(
        "{% for line in message.content.split('\\n') %}{{ line }}{% endfor %}"
    ),
    "cohere: a macro": (
        "{% macro show(text) %}{{ text.strip() }}{% endmacro %}"
        + of_messages("{{ show(message.content) }}")
    ),
    "printed as JSON": of_messages("{{ message.content | tojson }}"),
}
TAKES_PARTS = {
    "llava": of_messages(LOOP),
    "smolvlm": of_messages(
        "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
        "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    ),
    "selectattr": of_messages(
        "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}"
        "{% endfor %}"
    ),
    "map": of_messages("{{ message.content | map(attribute='text') | join }}"),
    "an alias of all messages and of the content": (
        "{% set rest = messages[0:] %}{% for m in rest %}{% set parts = m.get('content') %}"
        "{% for p in parts %}{{ p['text'] }}{% endfor %}{% endfor %}"
    ),
    "a macro": (
        "{% macro show(parts) %}{% for p in parts %}{{ p.text }}{% endfor %}{% endmacro %}"
        + of_messages("{{ show(message.content) }}")
    ),
    "a macro that is given the message": (
        "{% macro show(m) %}{% for p in m['content'] %}{{ p.text }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ show(m) }}{% endfor %}"
    ),
    "a namespace": (
        "{% set ns = namespace(c=none) %}"
        "{% for m in messages %}{% set ns.c = m.content %}"
        "{% for p in ns.c %}{{ p.text }}{% endfor %}{% endfor %}"
    ),
    "reversed": "{% for m in messages | reverse %}"
    "{% for p in m.content | list %}{{ p.text }}{% endfor %}{% endfor %}",
}
TAKES_EITHER = {
    "llama 3.2": of_messages(
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|image|>"
        "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}"
        "{% endif %}"
    ),
    "gemma 3": of_messages(
        "{% if message['content'] is string %}{{ message['content'] | trim }}"
        "{% elif message['content'] is iterable %}{% for item in message['content'] %}"
        "{% if item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% else %}"
        "{{ raise_exception('Invalid content type') }}{% endif %}"
    ),
    "qwen 2 vl": of_messages(
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for content in message['content'] %}{% if 'text' in content %}{{ content['text'] }}"
        "{% endif %}{% endfor %}{% endif %}"
    ),
    "pixtral": of_messages(
        "{% if message['content'] is not string %}{% for block in message['content'] %}"
        "{{ block['text'] }}{% endfor %}{% else %}{{ message['content'] }}{% endif %}"
    ),
    "llama 4: a macro": (
        "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}"
        "{% for c in content %}{{ c.text }}{% endfor %}{% endif %}{% endmacro %}"
        + of_messages("{{ show(message.content) }}")
    ),
}
ALL = TAKES_STRINGS | TAKES_PARTS | TAKES_EITHER
FAILS_ALONE = "{{ 'Tools: ' + functions }}"  # so that only the source tells what it takes


def shown(source: str, content: object, **kwargs: str) -> str:
    template = ChatTemplate(source, Path("chat_template.jinja"))
    return template.render([{"role": "user", "content": content}], template_kwargs=kwargs)


@pytest.mark.parametrize("name", ALL)
def test_users_text_is_shown_however_it_is_sent(name: str) -> None:
    as_text, as_parts = shown(ALL[name], TEXT), shown(ALL[name], PARTS)
    assert TEXT in as_text
    assert as_parts == (shown(ALL[name], LINES) if name in TAKES_STRINGS else as_text)


@pytest.mark.parametrize("name", ALL)
def test_also_where_the_source_alone_tells(name: str) -> None:
    source = FAILS_ALONE + ALL[name]
    as_text, as_parts, as_lines = (
        shown(source, content, functions="none") for content in (TEXT, PARTS, LINES)
    )
    assert TEXT in as_text
    assert as_parts == (as_lines if name in TAKES_STRINGS else as_text)


@pytest.mark.parametrize("head", ["", FAILS_ALONE])
def test_a_template_that_tells_them_apart_gets_what_was_sent(head: str) -> None:
    source = head + of_messages(
        "{% if message.content is string %}S{{ message.content }}{% else %}"
        "{% for c in message.content %}P{{ c.text }}{% endfor %}{% endif %}"
    )
    kwargs = {"functions": ""} if head else {}
    assert shown(source, TEXT, **kwargs).endswith("<user>SHi there")
    assert shown(source, PARTS, **kwargs).endswith("<user>PHi Pthere")


def test_roles_may_differ() -> None:
    source = (
        "{% for message in messages %}{% if message.role == 'user' %}" + LOOP + "{% else %}"
        "{{ '(' + message.content + ')' }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, Path("chat_template.jinja"))
    for content, line in ((TEXT, TEXT), (PARTS, LINES)):
        roles = ("system", "user", "assistant", "user")
        text = template.render([{"role": role, "content": content} for role in roles])
        assert text == f"({line}){TEXT}({line}){TEXT}"


def test_only_the_text_of_a_part_reaches_a_template() -> None:
    part = {"type": "text", "text": TEXT, "cache_control": {"type": "ephemeral"}}
    assert shown(of_messages("{{ message.content }}"), [part]) == f"<user>{TEXT}"
    source = of_messages("{% for p in message.content %}{{ p|length }}{{ p.text }}{% endfor %}")
    assert shown(source, [part]) == f"<user>2{TEXT}"


def test_no_parts_are_an_empty_text() -> None:
    assert shown(TAKES_STRINGS["chatml"], []) == "<user>"
    assert shown(TAKES_PARTS["llava"], []) == "<user>"


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TAKES_PARTS | TAKES_EITHER)
def test_parts_are_rendered_as_by_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import (  # noqa: PLC0415  an extra
        render_jinja_template,
    )

    messages = [{"role": "user", "content": PARTS}]
    theirs, _ = render_jinja_template([messages], chat_template=ALL[name])
    assert shown(ALL[name], PARTS) == theirs[0]
