"""What a body is made of is counted before it is parsed."""

import json

import pytest

from duetto.server.http.body import MAX_CONTAINERS, MAX_STRINGS, MAX_VALUES, check_structure
from duetto.server.http.errors import ApiError


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "' + b"[{" * 200_000 + b'"}',
        b'{"prompt": "' + b'\\"[\\\\' * 100_000 + b'"}',
        json.dumps({"prompt": ['say "[]" and \\'] * 40_000}).encode(),
        json.dumps({"logit_bias": {str(i): 1 for i in range(262_144)}}).encode(),
        json.dumps(
            {"messages": [{"role": "user", "content": [{"text": "["}] * 3}] * 5000}
        ).encode(),
    ],
)
def test_long_texts_and_full_lists_pass(body):
    check_structure(body)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"prompt":[' + b"[]," * 1_390_000 + b"[]]}", f"at most {MAX_CONTAINERS}"),
        (b'{"prompt":["[[\\\\","\\"",' + b"{}," * MAX_CONTAINERS + b"[]]}", "lists and objects"),
        (b'{"stop":[' + b'"",' * 1_000_000 + b'""]}', f"at most {MAX_STRINGS}"),
        (b"[" * 4 * 2**20, "lists and objects"),
        (b'{"tokens": [' + b"100," * 2**19 + b"100]}", f"at most {MAX_VALUES}"),
        (b'"' * 4 * 2**20, "strings"),
    ],
)
def test_millions_of_small_things_are_refused_unparsed(body, words):
    with pytest.raises(ApiError) as refused:
        check_structure(body)
    assert refused.value.status == 400 and words in str(refused.value)
