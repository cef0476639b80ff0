"""What the lists of other projects' tests share: a server to ask, and a table of what passed.

A check has the name of their test, and is ours: their prompts, models and values are not here. One
that does not apply has the reason instead. One that we know to fail says why.
"""

import json
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx2

MODEL = "duetto-demo"
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
PROMPT = "Document: Nanchem is based in Gilcross.\nQuestion: Where is Nanchem based?"
USER = [{"role": "user", "content": PROMPT}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
FLAT_TOOL = {"type": "function", "name": "weather", "parameters": CITY}
NAMED = {"type": "function", "function": {"name": "weather"}}

Check = Callable[["Server"], None]


class Server:
    """One that runs; every reply is checked to have the status that the caller expects."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.http = httpx2.Client(base_url=url, timeout=120)
        self.key = key

    def ask(
        self, method: str, path: str, body: Any = None, *, status: int = 200, **more: Any
    ) -> Any:
        reply = self.http.request(method, path, json=body, **more)
        assert reply.status_code == status, f"{path}: {reply.status_code} {reply.text[:500]}"
        return reply.json() if reply.content else None

    def get(self, path: str, **more: Any) -> Any:
        return self.ask("GET", path, **more)

    def post(self, path: str, body: Any, **more: Any) -> Any:
        return self.ask("POST", path, {"model": MODEL, **body}, **more)

    def refused(self, path: str, body: Any, *words: str, status: int = 400) -> dict[str, Any]:
        error = self.post(path, body, status=status)["error"]
        for word in words:
            assert word in json.dumps(error), (word, error)
        return error

    def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        reply = self.http.post(path, json={"model": MODEL, **body, "stream": True})
        assert reply.status_code == 200, reply.text[:500]
        data = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
        return [json.loads(each) for each in data if each != "[DONE]"]

    def complete(self, prompt: Any = PROMPT, **more: Any) -> dict[str, Any]:
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": 5, **more})

    def stream_completion(self, prompt: Any = PROMPT, **more: Any) -> list[dict[str, Any]]:
        return self.events("/v1/completions", {"prompt": prompt, "max_tokens": 5, **more})

    def chat(self, messages: Any = USER, **more: Any) -> dict[str, Any]:
        return self.post("/v1/chat/completions", {"messages": messages, "max_tokens": 5, **more})

    def stream_chat(self, messages: Any = USER, **more: Any) -> list[dict[str, Any]]:
        return self.events("/v1/chat/completions", {"messages": messages, "max_tokens": 5, **more})

    def respond(self, given: Any = PROMPT, **more: Any) -> dict[str, Any]:
        return self.post("/v1/responses", {"input": given, "max_output_tokens": 200, **more})

    def stream_response(self, given: Any = PROMPT, **more: Any) -> list[dict[str, Any]]:
        return self.events("/v1/responses", {"input": given, "max_output_tokens": 200, **more})

    def say(self, messages: Any = USER, **more: Any) -> dict[str, Any]:
        return self.post("/v1/messages", {"messages": messages, "max_tokens": 50, **more})

    def stream_message(self, messages: Any = USER, **more: Any) -> list[dict[str, Any]]:
        return self.events("/v1/messages", {"messages": messages, "max_tokens": 50, **more})


class Entry(NamedTuple):
    file: str
    name: str
    check: Check | None  # None: does not apply
    why: str  # it does not apply, or is known to fail


class Suite:
    def __init__(self, title: str, folder: str, dated: str) -> None:
        self.title = title
        self.folder = folder
        self.dated = dated
        self.entries: list[Entry] = []

    def test(self, file: str, *, differs: str = "", name: str = "") -> Callable[[Check], Check]:
        """`differs`: why it fails: our server is meant to differ, or has it not yet."""

        def add(check: Check) -> Check:
            self.entries.append(Entry(file, name or check.__name__, check, differs))
            return check

        return add

    def leaves_out(self, file: str, why: str, *names: str) -> None:
        self.entries.extend(Entry(file, name, None, why) for name in names)

    def run(self, server: Server) -> list[tuple[Entry, str]]:
        """With each entry `passes`, `fails` or `–`."""
        results = []
        for entry in self.entries:
            result = "–"
            if entry.check is not None:
                try:
                    entry.check(server)
                    result = "passes"
                except Exception:
                    result = "fails"
                    if not entry.why:
                        print(f"FAIL {entry.file}::{entry.name}")
                        print("     " + traceback.format_exc(limit=-3).replace("\n", "\n     "))
            results.append((entry, result))
        return results


def said(choice_or_chunks: Any) -> str:
    """The text of a choice, or of a stream of chunks."""
    if isinstance(choice_or_chunks, list):
        return "".join(
            choice.get("text") or choice.get("delta", {}).get("content") or ""
            for chunk in choice_or_chunks
            for choice in chunk["choices"]
        )
    return (
        choice_or_chunks["text"]
        if "text" in choice_or_chunks
        else (choice_or_chunks["message"]["content"])
    )


def message_text(reply: dict[str, Any]) -> str:
    """The text of a Response."""
    items = [item for item in reply["output"] if item["type"] == "message"]
    return "".join(part["text"] for item in items for part in item["content"])
