"""A prefill worker and a decode worker as processes, and what happens when one is killed."""

import os
import signal

import pytest
from cluster.test_worker_process import ARGS, SECRET, listening_at, worker_process
from cluster_world import Heard, door
from fakes import make_request

from duetto import __version__
from duetto.build import build
from duetto.cluster.secret import ClusterSecret
from duetto.core.request import FinishReason
from duetto.demo import demo_model_dir
from duetto.worker_facts import facts_of

pytestmark = pytest.mark.oracle  # takes long: its parts are tested in one process


def requests(name: str):
    return [
        make_request(f"{name}{i}", range(3 + i, 90 + 5 * i), 9, seed=i, top_k=20, logprobs=1)
        for i in range(4)
    ]


def answers(heard: Heard, name: str) -> list:
    found = []
    for request in requests(name):
        assert heard.final(request.request_id).finish_reason is FinishReason.LENGTH
        found.append([token for u in heard.updates(request.request_id) for token in u.tokens])
    return found


@pytest.mark.parametrize("link", ["shm://*", "tcp://127.0.0.1:*"])
def test_the_same_bits_until_the_prefill_worker_is_killed_and_then_too(link) -> None:
    built = build(demo_model_dir(), ARGS)
    facts = facts_of(built, __version__)
    here = []
    for request in requests("here"):
        built.engine.add(request)
        tokens = []
        while built.engine.has_work:
            tokens += [token for u in built.engine.step().updates for token in u.tokens]
        here.append(tokens)
    heard = Heard(ours=facts)
    listen = ("--listen", "tcp://127.0.0.1:*")
    with (
        worker_process(*listen, "--role", "prefill", "--kv-link", link) as prefill,
        worker_process(*listen, "--role", "decode", "--max-local-prefill", "20") as decode,
        door(heard, ClusterSecret(SECRET.encode()), 3.0, version=__version__) as doorway,
    ):
        doorway.call(listening_at(prefill))
        prefill_at = (heard.worker(0).facts.link,)
        doorway.call(listening_at(decode))
        worker = heard.worker(1)
        assert worker.facts.role == "decode"

        def ask(name: str) -> None:
            for request in requests(name):
                request.cache_salt = name.encode()  # nothing of it is there
                request.prefill_at = prefill_at
                worker.add(request)

        ask("a")
        assert answers(heard, "a") == here
        records = [report.record for report in heard.reports if report.record is not None]
        moved = [record.transfers for record in records if record.transfers is not None]
        assert sum(one.num_imported for one in moved) == 4
        ask("b")
        os.kill(prefill.pid, signal.SIGSTOP)  # half-open: nobody says anything
        ask("c")
        assert answers(heard, "b") == here
        assert answers(heard, "c") == here
        prefill.kill()
        ask("d")
        assert answers(heard, "d") == here
