"""Which dialects a template shows, and which names there are."""

import pytest

from duetto.core.errors import ConfigError
from duetto.dialects.choose import CALL_DIALECTS, choose_dialects
from duetto.dialects.reasoning import REASONING_DIALECTS

LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"
# In the manner of each family, and much shorter.
TEMPLATES = {
    LOOP: (None, None),
    "{% if tools %}{{ tools | tojson }}{% endif %}" + LOOP: ("json", None),
    "{% if tools %}<tool_call>{'name': n}</tool_call>{% endif %}": ("hermes", None),
    "{{ tools }}<tool_call></tool_call><think>\n\n</think>": ("hermes", "think"),
    "<tool_call>\n<function=f>\n<parameter=p>\n</tool_call>": ("qwen3_coder", None),
    "<seed:tool_call><function=f><parameter=p><seed:think>": ("seed_oss", "seed_oss"),
    "{{ '<|python_tag|>' + call.name }}{{ tools }}": ("llama3_json", None),
    '{"name": function name, "parameters": dictionary of argument name and its value}': (
        "llama3_json",
        None,
    ),
    "{{ tools }} [func_name1(params_name1=params_value1)]": ("pythonic", None),
    "{{ '<|python_start|>' }}{{ tools }}": ("pythonic", None),
    "[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS] [{'name'}]": ("mistral_list", None),
    "{{ tools }}[TOOL_CALLS]{{ name }}[ARGS]{{ a }}[THINK]": ("mistral", "mistral"),
    "<|tool|>{{ tools }}<|/tool|>": ("phi4_mini_json", None),
    "{{ tools }} answer with functools[...]": ("phi4_mini_json", None),
    "<start_function_call>call:{{ name }}": ("functiongemma", None),
    "<|tool_call>call:{{ name }}<tool_call|><|channel>thought": ("gemma4", "gemma4"),
    "{{ tools }} write it in ```tool_code": ("tool_code", None),
    "<｜tool▁calls▁begin｜>{{ name }}\n```json": ("deepseek_v3", None),
    "<｜tool▁calls▁begin｜>{{ name }}</think>": ("deepseek_v31", "think"),
    "<|channel|>analysis<|message|>{{ tools }}": ("openai", "openai_gptoss"),
    "{{ tools }}<|tool_call|>": ("granite", None),
    "{{ tools }}<tool_call> Here is my thought process: x Here is my response: ": (
        "granite",
        "granite",
    ),
}


def names(dialects):
    return tuple(dialect and dialect.name for dialect in dialects)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_shows_its_dialects(template):
    assert names(choose_dialects(template)) == TEMPLATES[template]


def test_without_a_template_nothing_is_known():
    assert choose_dialects(None) == (None, None)


def test_every_dialect_is_shown_by_some_template_or_named():
    shown = {calls for calls, _ in TEMPLATES.values()}
    assert {dialect.name for dialect in CALL_DIALECTS} <= shown


def test_names_overrule_the_template():
    template = "{{ tools }}<tool_call></tool_call>"
    assert names(choose_dialects(template, tool_call_parser="pythonic")) == ("pythonic", None)
    assert names(choose_dialects(template, reasoning_parser="qwen3")) == ("hermes", "think")
    assert names(choose_dialects(None, tool_call_parser="llama4_json")) == ("llama3_json", None)


def test_harmony_is_both_or_neither():
    assert names(choose_dialects("", tool_call_parser="openai")) == ("openai", "openai_gptoss")
    assert names(choose_dialects("", reasoning_parser="harmony")) == ("openai", "openai_gptoss")
    with pytest.raises(ConfigError, match="go only together"):
        choose_dialects("", tool_call_parser="openai", reasoning_parser="think")


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError) as caught:
        choose_dialects("", tool_call_parser="hermes2")
    message = str(caught.value)
    assert message.startswith("--tool-call-parser: there is no parser 'hermes2'; known are: hermes")
    assert "granite4" in message and "qwen3_xml" in message
    with pytest.raises(ConfigError, match=r"--reasoning-parser: .*deepseek_r1"):
        choose_dialects("", reasoning_parser="deepseek")


def test_names_and_aliases_mean_one_dialect():
    for dialects in (CALL_DIALECTS, REASONING_DIALECTS):
        all_names = [name for dialect in dialects for name in (dialect.name, *dialect.aliases)]
        assert len(all_names) == len(set(all_names))
