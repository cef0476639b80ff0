"""Small chat templates with tools, written for these tests in the manner of each family.

`EXPECTED` is what CONVERSATION becomes; the loop variables' names and the words are ours.
"""

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
TOOL_JSON = (
    '{"type": "function", "function": {"name": "look_up", "description": "Look a word up.", '
    '"parameters": {"type": "object", "properties": {"word": {"type": "string"}}}}}'
)
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "look_up", "arguments": '{"word": "sea", "top": 2}'},
}
CONVERSATION = [
    {"role": "user", "content": "Define sea."},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "Water."},
]


def with_lines(source: str) -> str:
    """Jinja takes away a line break behind a tag, unless it is printed."""
    return source.replace("\n", "{{ '\\n' }}")


HERMES = with_lines(
    "<sys>{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}\n"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<tool>{{ m.content }}\n"
    "{% elif m.role == 'assistant' and m.tool_calls %}<assistant>{{ m.content or '' }}"
    "{% for call in m.tool_calls %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}\n"
    "{% else %}<{{ m.role }}>{{ m.content }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Loops over tools without asking for them, so that None is an error.
NEEDS_A_LIST = HERMES.replace("{% if tools %}", "").replace(
    "{% endfor %}{% endif %}", "{% endfor %}", 1
)
# Asks only whether there are tools, and so is given none.
NEEDS_ABSENCE = HERMES.replace(
    "{% if tools %}", "{% if tools is defined %}{{ 'Tools:' + tools[0].function.name }}"
)
LLAMA_JSON = with_lines(
    "{% if not tools is defined %}{% set tools = none %}{% endif %}"
    "<sys>{% if tools is not none %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}\n"
    "{% for m in messages %}{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    '<assistant>{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}\n'
    "{% elif m.role in ('tool', 'ipython') %}<tool>"
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | tojson }}{% endif %}\n"
    "{% else %}<{{ m['role'] }}>{{ m['content'] | trim }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MISTRAL = with_lines(
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if tools is not none and loop.first %}[TOOLS]{{ tools | tojson }}\n{% endif %}"
    "<user>{{ m['content'] }}\n"
    "{% elif m.tool_calls is defined and m.tool_calls is not none %}[CALLS]["
    "{% for call in m.tool_calls %}{% if call.id is not defined or call.id | length != 9 %}"
    "{{ raise_exception('An id must have nine letters or digits!') }}{% endif %}"
    "{{ call.function | tojson }} {{ call.id }}{% endfor %}]\n"
    "{% elif m['role'] == 'assistant' %}{{ '<assistant>' + m['content'] + '\\n' }}"
    "{% elif m['role'] == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('An id must have nine letters or digits!') }}{% endif %}"
    "[RESULT]{{ m.content }} {{ m.tool_call_id }}\n"
    "{% endif %}{% endfor %}"
)
# Writes the arguments as they are: they must be a string. A content of "" hides the calls.
DEEPSEEK = with_lines(
    "{% if tools %}{% for t in tools %}{{ t.function.name + ': ' + t.function.description }}\n"
    "{% endfor %}{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' and m['content'] is none %}<assistant>"
    "{% for c in m['tool_calls'] %}"
    "{{ c['type'] + '|' + c['function']['name'] + '\\n' + c['function']['arguments'] }}"
    "{% endfor %}\n"
    "{% elif m['role'] == 'assistant' %}{{ '<assistant>' + m['content'] + '\\n' }}"
    "{% elif m['role'] == 'tool' %}{{ '<tool>' + m['content'] + '\\n' }}"
    "{% else %}{{ '<user>' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
# Prints a content that is missing as "None", and wants the arguments' names.
PYTHONIC = with_lines(
    "{% if tools %}{{ tools[0].function.name }}({{ tools[0].function.parameters.properties | "
    "list | join }})\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}("
    "{% for name, value in c.function.arguments.items() %}{{ name }}={{ value | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}){% endfor %}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Results are of named tools, and contents are lists of parts.
GEMMA = with_lines(
    "{% if tools %}{% for t in tools %}declare {{ t.function.name }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}response:{{ m.name }}"
    "{{ '{' + m.content[0]['text'] + '}' }}\n"
    "{% else %}<{{ 'model' if m.role == 'assistant' else m.role }}>"
    "{% for part in m.content or [] %}{{ part.text }}{% endfor %}"
    "{% for c in m.tool_calls or [] %}call:{{ c.function.name }}{{ '{' }}"
    "{% for k, v in c.function.arguments | dictsort %}{{ k }}:{{ v }};{% endfor %}{{ '}' }}"
    "{% endfor %}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)
THINKING = with_lines(
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and m.reasoning_content is string %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% else %}<think>\n{% endif %}{% endif %}"
)
WITHOUT_TOOLS = with_lines(
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_CALL = '<assistant><tool_call>{"name": "look_up", "arguments": {"word": "sea", "top": 2}}'
_HERMES = f"<user>Define sea.\n{_CALL}</tool_call>\n<tool>Water.\n<assistant>"
FAMILIES = {
    "hermes": (HERMES, f"<sys>{TOOL_JSON}\n{_HERMES}"),
    "hermes that needs a list": (NEEDS_A_LIST, f"<sys>{TOOL_JSON}\n{_HERMES}"),
    "hermes that needs no name": (NEEDS_ABSENCE, f"<sys>Tools:look_up{TOOL_JSON}\n{_HERMES}"),
    "llama": (
        LLAMA_JSON,
        f'<sys>{TOOL_JSON}\n<user>Define sea.\n<assistant>{{"name": "look_up", "parameters": '
        '{"word": "sea", "top": 2}}\n<tool>Water.\n<assistant>',
    ),
    "mistral": (
        MISTRAL,
        f'[TOOLS][{TOOL_JSON}]\n<user>Define sea.\n[CALLS][{{"name": "look_up", "arguments": '
        '{"word": "sea", "top": 2}} 74196fe72]\n[RESULT]Water. 74196fe72\n',
    ),
    "deepseek": (
        DEEPSEEK,
        "look_up: Look a word up.\n<user>Define sea.\n<assistant>function|look_up\n"
        '{"word": "sea", "top": 2}\n<tool>Water.\n<assistant><think>\n',
    ),
    "pythonic": (
        PYTHONIC,
        'look_up(word)\n<user>Define sea.\n<assistant>look_up(word="sea", top=2)\n<tool>Water.\n'
        "<assistant>",
    ),
    "gemma": (
        GEMMA,
        "declare look_up\n<user>Define sea.\n<model>call:look_up{top:2;word:sea;}\n"
        "response:look_up{Water.}\n<model>",
    ),
}
