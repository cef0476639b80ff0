"""A server whose model says a given text, in Hermes's way of calling and with <think>."""

import json

from server.fakes_server import SpeakingExecutor, make_app
from starlette.testclient import TestClient

from duetto.dialects.choose import choose_dialects
from duetto.engine.speech import Speech


def saying(text, **settings):
    speech = Speech(choose_dialects(None, tool_call_parser="hermes", reasoning_parser="think"))
    app, _ = make_app(SpeakingExecutor(text), speech=speech, **settings)
    return TestClient(app)


def named_events(client, path, body):
    """Of a stream whose events have names; checks the framing on the way."""
    reply = client.post(path, json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    events = []
    for block in reply.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events
