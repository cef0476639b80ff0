"""Replies in parts are the same replies."""

import asyncio
import json

import pytest

from duetto.server.http.json_parts import (
    NUM_AT_ONCE,
    NUM_PLAIN_AT_ONCE,
    WRITE_BYTES,
    EncodedParts,
    JsonColumns,
    PartsResponse,
    json_parts,
    packed,
)


def rows(start, end):
    return {"id": list(range(start, end)), "top": [{"a": [i, None]} for i in range(start, end)]}


@pytest.mark.parametrize("size", [0, 1, NUM_AT_ONCE, NUM_AT_ONCE + 1, 1000])
def test_columns_are_made_by_a_few_rows_at_a_time(size):
    asked = []

    def make(start, end):
        asked.append(end - start)
        return rows(start, end)

    columns = JsonColumns(size, make)
    assert json.loads(b"".join(json_parts({"x": columns}))) == {"x": rows(0, size)}
    assert max(asked) <= NUM_AT_ONCE


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        "text",
        {"a": (), "b": [{}], "c": [{"d": [1.5, None, "é\n"]}, {"e": {}}]},
        list(range(2 * NUM_PLAIN_AT_ONCE + 1)),
        {"choices": [{"index": i, "text": "x" * 10 * i} for i in range(100)]},
    ],
)
def test_parts_together_are_the_json(value):
    whole = b"".join(json_parts(value))
    assert json.loads(whole) == json.loads(json.dumps(value))
    assert b"".join(packed(json_parts(value))) == whole


def test_packed_parts_are_neither_small_nor_copied():
    shared = EncodedParts("x" * WRITE_BYTES)
    (long,) = shared.shared
    parts = packed(json_parts([{"a": shared}, {"a": shared}]))
    assert sum(part is long for part in parts) == 2
    small = packed(iter([b"y" * 100] * 5000))
    assert all(len(part) >= WRITE_BYTES for part in small[:-1])


def sent_by(response, delay_s=0.0):
    messages = []

    async def send(message):
        messages.append(message)
        await asyncio.sleep(delay_s)

    asyncio.run(response({}, None, send))
    return messages


def test_a_reply_says_its_length_is_sent_in_writes_and_tells_its_end():
    ends, parts = [], [b"a" * 3 * WRITE_BYTES, b"b"]
    start, *bodies = sent_by(PartsResponse(parts, lambda: ends.append(1)))
    headers = dict(start["headers"])
    assert headers[b"content-length"] == str(3 * WRITE_BYTES + 1).encode()
    assert headers[b"content-type"] == b"application/json"
    assert max(len(m["body"]) for m in bodies) <= WRITE_BYTES
    assert b"".join(m["body"] for m in bodies) == b"a" * 3 * WRITE_BYTES + b"b"
    assert [m["more_body"] for m in bodies][-2:] == [True, False]
    assert ends == [1] and not any(parts)  # what was written is held no longer


def test_a_client_that_takes_too_little_is_left(monkeypatch):
    monkeypatch.setattr("duetto.server.http.json_parts.GRACE_S", 0.01)
    ends = []
    messages = sent_by(PartsResponse([b"a"], lambda: ends.append(1)), delay_s=5.0)
    assert len(messages) == 1 and ends == [1]
