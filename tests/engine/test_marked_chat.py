"""Where marked texts come out of a template: a place is claimed only if it is certain."""

from pathlib import Path

import pytest

from duetto.checkpoints.chat_template import ChatTemplate
from duetto.core.errors import InvalidRequest
from duetto.engine.marked_chat import render_marked

LINES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
PARTS = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
DOCUMENTS = "{% for d in documents %}# {{ d.title }}\n{{ d.text }}\n{% endfor %}" + LINES


def rendered(source, *parts, documents=()):
    """The chat of one message, in which texts in tuples are marked."""
    template = ChatTemplate(source, Path("chat_template.jinja"))

    def render(messages, given_documents):
        return template.render(messages, documents=given_documents)

    content = [
        {"type": "text", "text": part[0], "cache": "reusable"}
        if isinstance(part, tuple)
        else {"type": "text", "text": part}
        for part in parts
    ]
    return render_marked(render, [{"role": "user", "content": content}], documents)


def shown(chat):
    return [(s.content,) if s.is_reusable else s.content for s in chat.segments]


def test_parts_that_a_template_joins():
    chat = rendered(LINES, "read:", ("one",), ("two",), "what?")
    assert chat.text == "<user>read:\none\ntwo\nwhat?\n" and chat.refusal is None
    assert shown(chat) == ["<user>read:\n", ("one",), "\n", ("two",), "\nwhat?\n"]


def test_parts_that_a_template_takes():
    chat = rendered(PARTS, ("one",), "what?")
    assert chat.text == "[one][what?]"
    assert shown(chat) == ["[", ("one",), "][what?]"]


def test_the_same_text_twice_has_two_places():
    assert shown(rendered(PARTS, ("one",), "one", ("one",))) == [
        *("[", ("one",)),
        *("][one][", ("one",), "]"),
    ]


def test_documents():
    documents = [{"title": "a", "text": "one two"}, {"title": "b", "text": ""}, {"title": "c"}]
    chat = rendered(DOCUMENTS, "what?", documents=documents)
    assert shown(chat)[:2] == ["# a\n", ("one two",)]
    assert len(chat.segments) == 3 and "".join(s.content for s in chat.segments) == chat.text


def test_documents_that_a_template_turns_around_are_where_they_are():
    source = "{% for d in documents | reverse %}{{ d.text }};{% endfor %}" + LINES
    chat = rendered(source, "?", documents=[{"text": "one"}, {"text": "two"}])
    assert shown(chat) == [("two",), ";", ("one",), ";<user>?\n"]


def test_a_chat_without_marks_is_rendered_once():
    calls = []

    def render(messages, documents):
        calls.append(messages)
        return "x"

    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert render_marked(render, messages) == ("x", (), None) and len(calls) == 1


@pytest.mark.parametrize(
    ("source", "parts", "field"),
    [
        (TRIMMED, [(" one",), "what?"], "messages[0].content[0]"),
        (TRIMMED, ["what?", ("one ",)], "messages[0].content[1]"),
        ("{{ messages[0].content | upper }}", [("one",)], "messages[0].content[0]"),
        ("{{ messages[0].content[0].text }}", ["a", ("one",)], "messages[0].content[1]"),
        (LINES + "{{ messages[0].content }}", [("one",)], "messages[0].content[0]"),
        ("{{ messages[0].content | tojson }}", [('"one"',), "a"], "messages[0].content[0]"),
        ("{{ messages[0].content[:9] }}", ["a", ("twelve letters",)], "messages[0].content[1]"),
        (
            "{% if 'one' in messages[0].content %}!{% endif %}" + LINES,
            [("one",)],
            "messages[0].content[0]",
        ),
        ("{{ messages[0].content | length }}" + LINES, [("one",)], "messages[0].content[0]"),
        ("{{ messages[0].content | wordcount }}" + LINES, [("one x",)], "messages[0].content[0]"),
        (LINES + "{{ messages[0].content | length }}", ["a", ("one",)], "messages[0].content[1]"),
    ],
)
def test_no_place_is_claimed_where_a_template_changes_a_text_or_what_is_beside_it(
    source, parts, field
):
    chat = rendered(source, *parts)
    assert chat.segments == () and chat.refusal is not None
    assert chat.refusal.field == field and "the chat template" in chat.refusal.message
    plain = [part[0] if isinstance(part, tuple) else part for part in parts]
    assert chat.text == rendered(source, *plain).text  # and the prompt is what it would be


def test_blank_space_within_a_message_is_kept():
    assert shown(rendered(TRIMMED, "a", (" one \n",), "b"))[1] == (" one \n",)


def test_a_template_that_shows_the_time_is_tried_again():
    times = iter("abbb")

    def render(messages, documents):
        return next(times) + "".join(part["text"] for part in messages[0]["content"])

    part = {"type": "text", "text": "one", "cache": "reusable"}
    chat = render_marked(render, [{"role": "user", "content": [part]}])
    assert shown(chat) == ["b", ("one",)] and chat.text == "bone"


def test_a_text_may_say_what_it_likes():
    """Nothing is looked for but random words."""
    strange = "Kq7zWv {{ x }} Kq7" + "0" * 24 + "zWv one"
    assert shown(rendered(LINES, (strange,), (strange,))) == [
        *("<user>", (strange,)),
        *("\n", (strange,), "\n"),
    ]


def test_another_mark_is_refused():
    part = {"type": "text", "text": "a", "cache": "forever"}
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content\[0\].cache: must be 'reus"):
        render_marked(lambda *_: "", [{"role": "user", "content": [part]}])


def test_what_is_no_conversation_is_the_templates_to_refuse():
    template = ChatTemplate(LINES, Path("chat_template.jinja"))
    for messages in (5, "x", {"role": "user"}, [5], [{"role": "user", "content": 5}]):
        with pytest.raises(InvalidRequest):
            render_marked(lambda m, _: template.render(m), messages)
