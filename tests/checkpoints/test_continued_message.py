"""A prompt may end within its last message, as transformers has it."""

from pathlib import Path
from typing import Any

import pytest
from checkpoints.tool_templates import CONVERSATION, GEMMA, HERMES, MISTRAL, THINKING, with_lines

from duetto.checkpoints.chat_template import ChatTemplate
from duetto.core.errors import InvalidRequest
from duetto.engine.marked_chat import render_marked
from duetto.engine.prompts import begins_answer

ENDS = with_lines(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMS = ENDS.replace("{{ m.content }}", "{{ m.content | trim }}")
# Ends only its last message, and writes a text only once it has looked at it.
LOOKS = (
    "{% for m in messages %}{% set text = m.content %}<{{ m.role }}>"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ text }}{% if loop.last %}<eos>{% endif %}{% endfor %}"
)
USER = {"role": "user", "content": "Q"}


def said(content: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": content}]


def continued(source: str, messages: Any, **kwargs: Any) -> str:
    template = ChatTemplate(source, Path("chat_template.jinja"))
    return template.render(
        messages, **{"add_generation_prompt": False, "continue_final_message": True, **kwargs}
    )


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        (ENDS, "Once upon", "<user>Q<end>\n<assistant>Once upon"),
        (ENDS, "Once ", "<user>Q<end>\n<assistant>Once "),
        (ENDS, "", "<user>Q<end>\n<assistant>"),
        (ENDS, "one Q one", "<user>Q<end>\n<assistant>one Q one"),
        (ENDS, [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}], "<assistant>a\nb "),
        (ENDS, [], "<user>Q<end>\n<assistant>"),
        (TRIMS, "Once upon", "<user>Q<end>\n<assistant>Once upon"),
        (TRIMS, "Once ", "<user>Q<end>\n<assistant>Once"),
        (LOOKS, "Once ", "<user>Q<assistant>Once "),
        (MISTRAL, "Once", "<user>Q\n<assistant>Once"),
        (GEMMA, "Once", "<user>Q\n<model>Once"),
        (THINKING, "Once", "<user>Q<end>\n<assistant>Once"),
    ],
)
def test_the_prompt_ends_within_the_message(source: str, content: Any, expected: str) -> None:
    assert continued(source, said(content)).endswith(expected)


@pytest.mark.parametrize(
    ("source", "messages", "words"),
    [
        (ENDS, [USER], "must be the assistant's"),
        (HERMES, CONVERSATION, "must be the assistant's"),
        (HERMES, CONVERSATION[:2], "no tool_calls"),
        (THINKING, [USER, {"role": "assistant", "reasoning": "Hm."}], "must have a text"),
        (ENDS.replace("m.content }}", "m.content | upper }}"), said("a"), "does not show"),
        ("{{ messages[0].content }}", said("a"), "does not show"),
        (LOOKS, said("a</think>b"), "does not show"),  # what was thought is gone
    ],
)
def test_a_message_that_cannot_be_continued(source: str, messages: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        continued(source, messages)
    assert caught.value.field == "continue_final_message"


def test_an_answer_either_begins_or_goes_on() -> None:
    with pytest.raises(InvalidRequest, match="either goes on or begins") as caught:
        continued(ENDS, said("a"), add_generation_prompt=True)
    assert caught.value.field == "continue_final_message"
    assert [begins_answer(None, each) for each in (None, False, True)] == [True, True, False]
    assert begins_answer(True, True) and not begins_answer(False, None)


def test_what_is_reused_keeps_its_place() -> None:
    template = ChatTemplate(ENDS, Path("chat_template.jinja"))
    part = {"type": "text", "text": "Once", "cache": "reusable"}

    def render(messages: Any, documents: Any) -> str:
        return template.render(
            messages, add_generation_prompt=False, continue_final_message=True, documents=documents
        )

    chat = render_marked(render, said([part, {"type": "text", "text": "b"}]))
    assert chat.text == "<user>Q<end>\n<assistant>Once\nb"
    assert [s.content for s in chat.segments if s.is_reusable] == ["Once"]
    chat = render_marked(render, said([part]))  # the last text itself
    assert [s.content for s in chat.segments] == ["<user>Q<end>\n<assistant>", "Once"]


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", [ENDS, TRIMS, LOOKS, MISTRAL, THINKING])
@pytest.mark.parametrize("content", ["Once upon", "Once ", " a", "Q"])
def test_continues_as_transformers(source: str, content: str) -> None:
    from transformers.utils.chat_template_utils import (  # noqa: PLC0415  an extra
        render_jinja_template,
    )

    theirs, _ = render_jinja_template(
        [said(content)], chat_template=source, continue_final_message=True
    )
    assert continued(source, said(content)) == theirs[0]
