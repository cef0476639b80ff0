"""vLLM's own option says the same here."""

import pytest

from duetto.cluster.events.publisher import PublisherAddresses
from duetto.cluster.events.vllm_config import read_vllm_config
from duetto.core.errors import ConfigError


def test_is_read_as_vllm_reads_it():
    given = """{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557",
        "replay_endpoint": "tcp://*:5558", "topic": "kv@pod@model", "buffer_steps": 7}"""
    assert read_vllm_config(given, is_open=True) == PublisherAddresses(
        "tcp://*:5557",
        "tcp://*:5558",
        "kv@pod@model",
        int_hashes=True,
        is_open=True,
        buffer_batches=7,
    )
    to_one = read_vllm_config('{"enable_kv_cache_events":true,"endpoint":"tcp://router:5557"}')
    assert to_one is not None
    assert to_one.connects  # where somebody listens for the events of many
    assert to_one.replay is None


def test_what_is_not_enabled_publishes_nothing():
    assert read_vllm_config("{}") is None
    assert read_vllm_config('{"enable_kv_cache_events":true,"publisher":"null"}') is None


@pytest.mark.parametrize(
    "given",
    [
        "",
        "[]",
        "{",
        '{"enable_kv_cache_events": "yes"}',
        '{"endpoints": "tcp://*:5557"}',
        '{"enable_kv_cache_events": true, "publisher": "kafka"}',
        '{"enable_kv_cache_events": true, "buffer_steps": 0}',
        '{"enable_kv_cache_events": true, "endpoint": "inproc://events"}',
        "[" * 100_000,
    ],
)
def test_what_is_wrong_is_one_line(given):
    with pytest.raises(ConfigError, match="--kv-events-config") as error:
        read_vllm_config(given)
    assert "\n" not in str(error.value)
