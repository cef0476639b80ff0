"""How each family writes calls, and what of its texts is no call. All texts are ours."""

import pytest
from dialects.answers import TOOLS, parsed_alike

from duetto.dialects.choose import CALL_DIALECTS
from duetto.dialects.pieces import CallArguments, CallEnd, CallStart, Content, Reasoning

DIALECTS = {dialect.name: dialect for dialect in CALL_DIALECTS}
SEP, BEGIN, END = "<｜tool▁sep｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
ALL_BEGIN, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL = "<|channel|>commentary to=functions.get <|constrain|>json<|message|>"

# What is read as an id, up to the limit of one, is not read again.
LONG_ID = '[TOOL_CALLS]get[CALL_ID][TOOL_CALLS] [{"name": "get", "arguments": {}}]' + "x" * 30


def short(pieces):
    """Content as it is, reasoning in a tuple, a call as name and arguments, "cut" if not whole."""
    out = []
    for piece in pieces:
        match piece:
            case Content(text):
                out.append(text)
            case Reasoning(text):
                out.append((text,))
            case CallStart(_, name):
                out.append([name, ""])
            case CallArguments(_, text):
                out[-1][1] += text
            case CallEnd(_, is_complete):
                out[-1] += [] if is_complete else ["cut"]
    return out


CASES = [
    # Qwen 3 Coder: types are the schema's, one line break around a value is not its
    (
        "qwen3_coder",
        'Hi\n<tool_call>\n<function=get_weather>\n<parameter=city>\nO "x"\n\n</parameter>\n'
        "<parameter=days>\n2\n</parameter>\n<parameter=note>\nNone\n</parameter>\n"
        "<parameter=where>\n{'a': True}\n</parameter>\n</function>\n</tool_call>\nend",
        [
            "Hi",
            [
                "get_weather",
                '{"city": "O \\"x\\"\\n", "days": 2, "note": null, "where": {"a": true}}',
            ],
            "end",
        ],
    ),
    ("qwen3_coder", "<function=get>\n</function>\n</tool_call>x", [["get", "{}"], "x"]),
    ("qwen3_coder", "<function=get>\n</function> <b", [["get", "{}"], "<b"]),
    (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=days>many</parameter></function></tool_call>",
        [["get_weather", '{"days": "many"}']],
    ),
    (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=city>abc",
        [["get_weather", '{"city": "abc', "cut"]],
    ),
    (
        "qwen3_coder",
        "<tool_call><function=other></function>",
        ["<tool_call><function=other></function>"],
    ),
    (
        "seed_oss",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=hours>[1, 2]</parameter>\n"
        "<parameter=city>\nA\n</parameter>\n</function>\n</seed:tool_call>",
        [["get_weather", '{"hours": [1, 2], "city": "\\nA\\n"}']],
    ),
    # Llama
    (
        "llama3_json",
        '{"name": "get", "parameters": {"a": 1}}; {"name": "get", "parameters": {}} done',
        [["get", '{"a": 1}'], ["get", "{}"], "done"],
    ),
    (
        "llama3_json",
        'So <|python_tag|>{"type": "function", "name": "get", "parameters": {}}',
        ["So", ["get", "{}"]],
    ),
    (
        "llama3_json",
        '<|python_start|>{"name": "get", "parameters": {}}<|python_end|>',
        [["get", "{}"]],
    ),
    ("llama3_json", 'x\n  {"name": "get", "parameters": {}}', ["x", ["get", "{}"]]),
    ("llama3_json", 'x {"name": "get", "parameters": {}}', ['x {"name": "get", "parameters": {}}']),
    ("llama3_json", '{"name": "get"}', ['{"name": "get"}']),
    ("llama3_json", '<|python_tag|>get.call(a="b")', ['<|python_tag|>get.call(a="b")']),
    # Python
    (
        "pythonic",
        '[get_weather(city="Os\\"lo)", days=2), get(a=[1, None, {"b": (1.5, -2)}],)] bye',
        [
            ["get_weather", '{"city": "Os\\"lo)", "days": 2}'],
            ["get", '{"a": [1, null, {"b": [1.5, -2]}]}'],
            "bye",
        ],
    ),
    ("pythonic", "x\n[get()] y [get()]", ["x", ["get", "{}"], "y [get()]"]),
    ("pythonic", "<|python_start|>[get()]<|python_end|>", [["get", "{}"]]),
    ("pythonic", "[get(), other()]", [["get", "{}"], ", other()]"]),
    ("pythonic", '[get(a="x', ['[get(a="x']),
    *(("pythonic", text, [text]) for text in ("[get(1)]", "[get(a=b)]", "[get(a=1+1)]", "[1, 2]")),
    ("pythonic", "[get(a=__import__('os'))]", ["[get(a=__import__('os'))]"]),
    # Mistral
    ("mistral", '[TOOL_CALLS] [{"name": "get", "arguments": {}, "id": "123"}]', [["get", "{}"]]),
    (
        "mistral",
        'a[TOOL_CALLS]get_weather[ARGS]{"city": "x"}[TOOL_CALLS]get[CALL_ID]ab1[ARGS]{}',
        ["a", ["get_weather", '{"city": "x"}'], ["get", "{}"]],
    ),
    ("mistral_list", '[TOOL_CALLS]get{"a":1} x', [["get", '{"a":1}'], "x"]),
    ("mistral", "[TOOL_CALLS]gets[ARGS]{}", ["[TOOL_CALLS]gets[ARGS]{}"]),
    ("mistral", LONG_ID, [LONG_ID]),
    # Phi
    (
        "phi4_mini_json",
        '<|tool_call|>[{"name": "get", "arguments": {}},{"name":"get"}]<|/tool_call|>',
        [["get", "{}"], ["get", "{}"]],
    ),
    ("phi4_mini_json", 'functools[{"name": "get", "arguments": {}}] <b', [["get", "{}"], "<b"]),
    ("phi4_mini_json", "import functools\nx", ["import functools\nx"]),
    # Gemma
    (
        "functiongemma",
        "hm <start_function_call>call:get_weather{city:<escape>a}b<escape>,days:2,"
        "where:{a:<escape>x<escape>,b:[true,1.5]}}<end_function_call><start_function_call>"
        'call:get{a:New York, b: "q"}<end_function_call>',
        [
            "hm",
            ["get_weather", '{"city": "a}b", "days": 2, "where": {"a": "x", "b": [true, 1.5]}}'],
            ["get", '{"a": "New York", "b": "q"}'],
        ],
    ),
    ("functiongemma", "<start_function_call>call:get{a}", ["<start_function_call>call:get{a}"]),
    (
        "gemma4",
        '<|tool_call>call:get_weather{city:<|"|>Par"is<|"|>}<tool_call|>',
        [["get_weather", '{"city": "Par\\"is"}']],
    ),
    (
        "tool_code",
        "```tool_code\nget(a=1)\nget()\n```\n ok",
        [["get", '{"a": 1}'], ["get", "{}"], "ok"],
    ),
    ("tool_code", "```tool_code\n[get(a=1)]\n```", [["get", '{"a": 1}']]),
    ("tool_code", "```tool_code\nprint(1)\n```", ["```tool_code\nprint(1)\n```"]),
    # DeepSeek
    (
        "deepseek_v3",
        f'a{ALL_BEGIN}{BEGIN}function{SEP}get\n```json\n{{"a":1}}\n```{END}\n'
        f"{BEGIN}function{SEP}get_weather\n```json\n{{}}\n```{END}{ALL_END}b",
        ["a", ["get", '{"a":1}'], ["get_weather", "{}"], "b"],
    ),
    (
        "deepseek_v31",
        f'a{ALL_BEGIN}{BEGIN}get{SEP}{{"a":1}}{END}{BEGIN}get{SEP}{{}}{END}{ALL_END}',
        ["a", ["get", '{"a":1}'], ["get", "{}"]],
    ),
    # gpt-oss
    (
        "openai",
        f'<|channel|>analysis<|message|>hm<|end|><|start|>assistant{CALL}{{"a": 1}}<|call|>',
        [("hm",), ["get", '{"a": 1}']],
    ),
    (
        "openai",
        "<|channel|>commentary<|message|>plan<|end|>"
        "<|start|>assistant to=functions.get<|channel|>commentary<|message|>{}",
        ["plan", ["get", "{}"]],
    ),
    ("openai", "<|channel|>final<|message|>Hi.<|return|>", ["Hi."]),
    ("openai", "<|channel|>analysis<|message|>cut", [("cut",)]),
    ("openai", "plain", ["plain"]),
    (
        "openai",
        "<|channel|>commentary to=functions.other<|message|>{}<|call|>x",
        ["<|channel|>commentary to=functions.other<|message|>{}x"],
    ),
    ("openai", "<|channel|>anal", []),
    (
        "openai",
        "<|channel|>analysis to=browser.open<|message|>{}<|end|>x",
        ["<|channel|>analysis to=browser.open<|message|>{}x"],
    ),
    # Granite, and JSON of no family
    ("granite", '<|tool_call|>[{"name": "get", "arguments": {}}]', [["get", "{}"]]),
    ("granite", '<tool_call>{"name": "get", "arguments": {}}</tool_call> x', [["get", "{}"], "x"]),
    ("granite", '<function_call> {"name": "get", "arguments": {}} <b>', [["get", "{}"], "<b>"]),
    ("json", '```json\n[{"name": "get", "arguments": {}}]\n```\n', [["get", "{}"]]),
    ("json", 'So:\n{"name": "get", "parameters": {}}', ["So:", ["get", "{}"]]),
    ("json", '[1,2]\n{"a":1}', ['[1,2]\n{"a":1}']),
]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_a_text_of_the_family(name, text, expected):
    pieces = parsed_alike(lambda: DIALECTS[name].parser(TOOLS), text, num_cuts=5)
    assert short(pieces) == expected


def test_every_family_is_here():
    assert {name for name, *_ in CASES} | {"hermes"} == set(DIALECTS)


def test_a_string_of_xml_is_handed_on_as_it_comes():
    parser = DIALECTS["qwen3_coder"].parser(TOOLS)
    parser.push("<tool_call>\n<function=get_weather>\n<parameter=city>\nOs")
    assert parser.push('lo "') == [CallArguments(0, 'lo \\"')]
