"""Connections that are cut, freeze or crawl while requests run, seeded: each ends once, with its
answer or an error, and nothing stays held."""

import socket
import threading
import time
from contextlib import ExitStack, suppress
from random import Random

import pytest
from cluster_world import CONFIG, DEADLINE_S, Heard, address_of, door, until, worker_server
from fakes import generate_alone, make_request

from duetto.core.request import FinishReason


class Proxy:
    """A network between a door and a worker: TCP connections that can be broken."""

    def __init__(self, target):
        self.target = target
        self.pairs = []
        self.is_frozen = False  # connections that are there now stay open, and carry nothing
        self.delay_s = 0.0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                try:
                    far = socket.create_connection(self.target)
                except OSError:
                    near.close()
                    continue
                pair = {"near": near, "far": far, "is_frozen": False}
                self.pairs.append(pair)
                for one, other in ((near, far), (far, near)):
                    threading.Thread(
                        target=self._carry, args=(pair, one, other), daemon=True
                    ).start()

    def _carry(self, pair, one, other):
        with suppress(OSError):
            while data := one.recv(4096):
                time.sleep(self.delay_s)
                if not pair["is_frozen"]:
                    other.sendall(data)
        self._close(pair)

    def _close(self, pair):
        for name in ("near", "far"):
            with suppress(OSError):
                pair[name].shutdown(socket.SHUT_RDWR)
            pair[name].close()

    def cut(self):
        """At once, with whatever is under way."""
        for pair in self.pairs:
            for name in ("near", "far"):
                with suppress(OSError):  # a reset: what was not read is lost
                    pair[name].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self._close(pair)
        self.pairs.clear()

    def freeze(self):
        """Half-open: both sides think that the other is there."""
        for pair in self.pairs:
            pair["is_frozen"] = True

    def close(self):
        self.listener.close()
        self.cut()


class World:
    """A door and a worker behind a proxy, and what was asked of them."""

    def __init__(self, stack, seed):
        self.rng = Random(seed)
        self.heard = Heard(rescues=True)
        self.server = stack.enter_context(worker_server(dead_after_s=0.6))
        doorway = stack.enter_context(door(self.heard, dead_after_s=0.6))
        bound = self.server.wire.bind(address_of("tcp://127.0.0.1:*"), "--listen")
        self.server.listen(bound)
        self.proxy = Proxy(("127.0.0.1", bound.address.port))
        stack.callback(self.proxy.close)
        doorway.call(address_of(f"tcp://127.0.0.1:{self.proxy.port}"))
        self.requests = {}

    @property
    def worker(self):
        self.heard.wait(lambda: self.heard.workers and self.heard.workers[-1].state != "lost")
        return self.heard.workers[-1]

    def add(self):
        number = len(self.requests)
        made = make_request(
            f"r{number}",
            prompt=[self.rng.randrange(9) for _ in range(self.rng.randrange(1, 30))],
            max_tokens=self.rng.randrange(1, 60),
            seed=number,
        )
        self.requests[made.request_id] = made
        self.worker.add(made)

    def again(self):
        """Send elsewhere, which is here, what was not begun; as a router does."""
        while self.heard.rescued:
            request = self.heard.rescued.pop()
            self.worker.add(request)

    def act(self):
        match self.rng.choice(("cut", "cut", "freeze", "delay", "abort")):
            case "cut":
                self.proxy.cut()
            case "freeze":
                self.proxy.freeze()
            case "delay":
                self.proxy.delay_s = self.rng.choice((0.0, 0.002, 0.02))
            case "abort" if self.requests:
                self.worker.abort(self.rng.choice(sorted(self.requests)))

    def has_ended(self):
        self.again()
        return all(self.heard.finals(name) for name in self.requests)


def run(seed, num_faults):
    with ExitStack() as stack:
        world = World(stack, seed)
        for _ in range(num_faults):
            for _ in range(world.rng.randrange(1, 8)):
                world.add()
            world.act()
            world.again()
        world.proxy.delay_s = 0.0
        until(world.has_ended)
        for name, request in world.requests.items():
            (final,) = world.heard.finals(name)
            tokens = world.heard.tokens(name)
            alone = generate_alone(request)
            if final.finish_reason is FinishReason.LENGTH:
                assert tokens == alone
            else:
                assert final.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)
                assert tokens == alone[: len(tokens)]
        engine = world.server.engine
        until(lambda: not engine.has_work and not world.server.num_live)
        assert engine.scheduler.pool.num_free == CONFIG.num_blocks
        assert not any(worker.num_live for worker in world.heard.workers)
        return [
            final.finish_reason for name in world.requests for final in world.heard.finals(name)
        ]


def test_each_request_ends_once_whatever_is_cut():
    reasons = run(seed=1, num_faults=8)
    assert FinishReason.LENGTH in reasons


@pytest.mark.oracle  # takes long
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_faults(seed):
    assert DEADLINE_S > 5
    run(seed, num_faults=20)
