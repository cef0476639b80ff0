"""A proxy that writes down what a client sends, for tests/server/test_transcripts.py.

    python tests/clients/record.py UPSTREAM PORT FILE        # writes FILE when it is terminated

Kept of a request: method, path, the headers that an API reads, the body, and the status of its
reply. Left out: keys, long texts (their lengths are kept), requests that were sent before. An id
of a reply that a later request names becomes `$EXCHANGE.PREFIX.N$`: the Nth one with that prefix.
"""

import http.client
import json
import re
import signal
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

KEPT = ("accept", "content-type", "user-agent", "openai-beta")
ID = re.compile(r"\b(resp|msg|fc|rs|call|toolu)_[0-9A-Za-z]{8,}")
LONGEST_TEXT = 200
HOP = {"transfer-encoding", "connection", "keep-alive", "content-length"}


class Transcript:
    """What was sent so far. The handlers' threads share it."""

    def __init__(self) -> None:
        self.exchanges: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}  # an id of a reply: how later requests call it
        self._lock = threading.Lock()

    def add(self, request: dict[str, Any], status: int, reply: str) -> None:
        with self._lock:
            exchange = json.loads(self._named(json.dumps({**request, "status": status})))
            if exchange not in self.exchanges:
                self.exchanges.append(exchange)
            at = self.exchanges.index(exchange)
            seen: dict[str, list[str]] = {}
            for found in ID.finditer(reply):
                ids = seen.setdefault(found[1], [])
                if found[0] not in ids:
                    ids.append(found[0])
            for prefix, ids in seen.items():
                for n, each in enumerate(ids):
                    self._names.setdefault(each, f"${at}.{prefix}.{n}$")

    def _named(self, text: str) -> str:
        return ID.sub(lambda found: self._names.get(found[0], found[0]), text)

    def write(self, path: Path) -> None:
        lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in self.exchanges)
        path.write_text(f"[\n{lines}\n]\n")


def shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shortened(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shortened(each) for each in value]
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return f"({len(value)} characters)"
    return value


def kept(headers: Any) -> dict[str, str]:
    found = {name.lower(): value for name, value in headers.items()}
    result = {
        name: value
        for name, value in found.items()
        if name in KEPT or name.startswith("anthropic-")
    }
    if "authorization" in found:
        result["authorization"] = "Bearer none"
    if "x-api-key" in found:
        result["x-api-key"] = "none"
    return result


def handler(upstream: str, transcript: Transcript) -> type[BaseHTTPRequestHandler]:
    class Passing(BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            connection = http.client.HTTPConnection(upstream, timeout=600)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP}
            headers["accept-encoding"] = "identity"
            connection.request(self.command, self.path, body, headers)
            reply = connection.getresponse()
            self.send_response(reply.status)
            for name, value in reply.getheaders():
                if name.lower() not in HOP:
                    self.send_header(name, value)
            self.end_headers()
            said = bytearray()
            with suppress(ConnectionError):  # the client has read enough
                while part := reply.read1(65536):
                    said += part
                    self.wfile.write(part)
            request = {
                "method": self.command,
                "path": self.path,
                "headers": kept(self.headers),
                "body": shortened(json.loads(body)) if body else None,
            }
            transcript.add(request, reply.status, said.decode(errors="replace"))

        do_GET = do_POST = do_DELETE = pass_on  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    return Passing


def main() -> None:
    upstream, port, path = sys.argv[1:]
    transcript = Transcript()
    server = ThreadingHTTPServer(
        ("127.0.0.1", int(port)), handler(urlsplit(upstream).netloc, transcript)
    )
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()
    transcript.write(Path(path))


if __name__ == "__main__":
    main()
