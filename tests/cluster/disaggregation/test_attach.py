"""Roles over real links: shared memory and TCP, in one process."""

import msgspec
import pytest
from cluster.disaggregation.test_pair import requests, same
from disaggregation_world import PATIENCE_S, Told, runner_of
from small_models import LLAMA, Kind, Model, make_model
from test_same_answer import answers

from duetto.cluster.disaggregation.attach import (
    EngineMemory,
    LinkOptions,
    WithRole,
    attach_disaggregation,
    check_role,
)
from duetto.cluster.facts import WorkerFacts
from duetto.cluster.secret import ClusterSecret
from duetto.core.errors import ConfigError


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Model]:
    kind = Kind(LLAMA, "cpu", "float32", None, "bfloat16")
    return [make_model(kind, tmp_path_factory.mktemp("model")) for _ in range(2)]


@pytest.fixture(scope="module")
def alone(models) -> dict[str, list]:
    found = {}
    for request in requests():
        found |= answers(models[0].engine(at_once=True), [request])
    return found


def with_role(model: Model, role: str, address: str, **facts: str) -> WithRole:
    engine = model.engine(at_once=True)
    told = {"model": "m", "numerics": "n", "kv_layout": "l", "version": "1"} | facts
    own = WorkerFacts(
        **told,
        worker_id=role,
        role=role,
        name="model",
        block_bytes=model.block_bytes,
        scheduler=engine.scheduler.config,
    )
    memory = EngineMemory(runner_of(engine).block_rows, lambda: model.backend.layers_done)
    links = LinkOptions(address, ClusterSecret(b"0123456789abcdef0123456789abcdef"))
    return attach_disaggregation(engine, memory, own, 101, max_local_prefill=0, links=links)


class Two:
    """A decode worker's engine and a prefill worker's, each on its thread."""

    def __init__(self, models, address: str, **prefill_facts: str) -> None:
        self.prefill = with_role(models[1], "prefill", address, **prefill_facts)
        self.decode = with_role(models[0], "decode", address)
        self.told = Told()
        self.handles = [
            self.decode.open_engine(self.told.deliver),
            self.prefill.open_engine(lambda report: None),
        ]
        for handle in self.handles:
            handle.start()

    def answers(self) -> dict[str, list]:
        asked = requests()
        for request in asked:
            request.prefill_at = (self.prefill.facts.link,)
            self.handles[0].add(request)
        names = {request.request_id for request in asked}
        self.told.wait_for(lambda: names <= self.told.ended)
        return {name: self.told.answer(name) for name in names}

    def close(self) -> None:
        for handle in self.handles:
            assert handle.stop(PATIENCE_S)
        self.decode.close()
        self.prefill.close()


@pytest.mark.parametrize("address", ["shm://*", "tcp://127.0.0.1:*"])
def test_the_same_bits(models, alone, address) -> None:
    two = Two(models, address)
    try:
        assert same(two.answers(), alone)
        assert two.decode.side.counts.num_imported >= 5
        moved = [record.transfers for record in two.told.records if record.transfers is not None]
        assert sum(one.num_bytes_in for one in moved) > 0
        assert sum(one.num_imported for one in moved) == two.decode.side.counts.num_imported
    finally:
        two.close()
    for one in (two.decode, two.prefill):
        one.side.engine.scheduler.check()
        assert one.side.engine.scheduler.imports.num_open == 0


def test_an_engine_of_another_model_is_not_asked_twice(models, alone) -> None:
    two = Two(models, "shm://*", numerics="others")
    try:
        assert same(two.answers(), alone)
        assert two.decode.side.counts.num_imported == 0
        (peer,) = two.decode.side._peers.values()
        assert peer.closed_until is not None
    finally:
        two.close()


def test_without_a_role_nothing_is_attached(models) -> None:
    one = with_role(models[0], "both", "shm://*")
    assert one.side is None
    assert one.facts.link == ""


@pytest.mark.parametrize(
    ("role", "options", "told"),
    [
        ("prefill", {"has_prefix_caching": False}, "--no-enable-prefix-caching"),
        ("decode", {"backend": "cuda"}, "--backend cuda"),
    ],
)
def test_what_cannot_have_a_role_is_told_in_a_line(role, options, told) -> None:
    with pytest.raises(ConfigError, match=told) as error:
        check_role(role, **{"has_prefix_caching": True, "backend": "cpu"} | options)
    assert "\n" not in str(error.value)
    check_role("both", **{"has_prefix_caching": True, "backend": "cpu"} | options)


def test_an_address_that_others_reach_needs_a_secret(models) -> None:
    engine = models[0].engine(at_once=True)
    facts = msgspec.structs.replace(
        with_role(models[0], "both", "").facts, role="prefill", scheduler=engine.scheduler.config
    )
    memory = EngineMemory(runner_of(engine).block_rows, lambda: (0, 0))
    with pytest.raises(ConfigError, match="--cluster-secret-file"):
        attach_disaggregation(engine, memory, facts, 101, links=LinkOptions("tcp://0.0.0.0:*"))
