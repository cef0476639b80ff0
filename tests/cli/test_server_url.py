"""A server's address, as it may be typed after --url and --base-url."""

import pytest
from measure.fake_server import FakeServer

from duetto.cli.bench import serve
from duetto.cli.eval import evaluate
from duetto.cli.explain import explain
from duetto.cli.server_url import server_url
from duetto.core.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("gpu-box", "http://gpu-box"),
        ("http://h:1/", "http://h:1"),
        ("h:1/v1", "http://h:1"),
        ("https://h/v1/", "https://h"),
        ("HTTPS://h/sub/v1", "HTTPS://h/sub"),
        (" h:8000 ", "http://h:8000"),
    ],
)
def test_it_needs_no_scheme(typed: str, url: str) -> None:
    assert server_url("--url", typed) == url


@pytest.mark.parametrize(
    "typed", ["", "http://", ":8000", "h:port", "h:99999", "ftp://h", "[::1:8000", "a b", "h:0"]
)
def test_what_is_no_address(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"--url .*like 127\.0\.0\.1:8000"):
        server_url("--url", typed)


def test_each_command_with_an_address_reads_it_so() -> None:
    with pytest.raises(ConfigError, match=r"--url http://127\.0\.0\.1:1.*: no Duetto answers"):
        explain(url="127.0.0.1:1")
    with pytest.raises(ConfigError, match="--url h:port: must be"):
        explain(url="h:port")
    for command in (serve, evaluate):
        with pytest.raises(ConfigError, match=r"nothing answers at http://127\.0\.0\.1:1 "):
            command(base_url="127.0.0.1:1")
        with pytest.raises(ConfigError, match="--base-url h:port: must be"):
            command(base_url="h:port")


def test_bench_finds_a_server_without_a_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer().running() as server:
        serve(base_url=server.base_url.removeprefix("http://") + "/v1", as_json=True)
    assert '"completed":100' in capsys.readouterr().out
