"""Two engines in one process: one that decodes, one that prefills, and a link between them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from threading import Condition
from typing import Any

from small_models import BLOCK_SIZE, VOCAB, Model

from duetto.cluster.disaggregation.decode_side import DecodeSide
from duetto.cluster.disaggregation.kv_frames import KVHello
from duetto.cluster.disaggregation.prefill_choice import PrefillChoice
from duetto.cluster.disaggregation.prefill_side import PrefillSide
from duetto.cluster.links.link import LinkUser
from duetto.cluster.links.pair import PairedEnd, link_pair
from duetto.core.batch import RequestUpdate
from duetto.core.executor import Executor
from duetto.core.request import Request
from duetto.engine.engine import Engine, StepReport
from duetto.engine.thread import EngineThread

PATIENCE_S = 60.0  # machines of tests are slow
ADDRESS = "pair"
Wrap = Callable[[Executor], Executor]


class Told:
    """What a door was told of its requests."""

    def __init__(self) -> None:
        self.updates: dict[str, list[RequestUpdate]] = defaultdict(list)
        self.ended: set[str] = set()
        self.records: list[Any] = []
        self._changed = Condition()

    def deliver(self, report: StepReport) -> None:
        with self._changed:
            if report.record is not None:
                self.records.append(report.record)
            for update in report.updates:
                assert update.request_id not in self.ended, "an update after the last one"
                self.updates[update.request_id].append(update)
                if update.finish_reason is not None:
                    self.ended.add(update.request_id)
            self._changed.notify_all()

    def wait_for(self, what: Callable[[], Any]) -> None:
        with self._changed:
            assert self._changed.wait_for(what, PATIENCE_S), "waited in vain"

    def answer(self, request_id: str) -> list[Any]:
        """Tokens and log-probabilities, and how it ended."""
        updates = self.updates[request_id]
        tokens = [token for update in updates for token in update.tokens]
        return [*tokens, updates[-1].finish_reason, updates[-1].error]


class Pair:
    """Both engines on threads of their own, as a worker runs them."""

    def __init__(
        self,
        models: tuple[Model, Model],
        *,
        decode: dict[str, Any] | None = None,
        prefill: dict[str, Any] | None = None,
        max_local_prefill: int | None = 0,
        timeout_s: float = PATIENCE_S,
        wrap_prefill: Wrap = lambda executor: executor,
        hello: Callable[[KVHello], KVHello] = lambda hello: hello,
    ) -> None:
        self.ends: list[tuple[PairedEnd, PairedEnd]] = []
        self.refuses = False
        model, other = models
        self.decode_engine = model.engine(at_once=True, **(decode or {}))
        self.prefill_engine = other.engine(at_once=True, executor=wrap_prefill, **(prefill or {}))
        choice = PrefillChoice(
            model.block_bytes, BLOCK_SIZE, 192, None, max_local_prefill, timeout_s
        )
        rows = runner_of(self.prefill_engine).block_rows
        own = KVHello(1, "test", "model", "numerics", "layout", BLOCK_SIZE, 1, len(rows))
        backend = other.backend
        self.prefill = PrefillSide(
            self.prefill_engine, rows, lambda: backend.layers_done, hello(own), VOCAB, choice
        )
        self.decode = DecodeSide(
            self.decode_engine, runner_of(self.decode_engine).block_rows, own, self._open, choice
        )
        self.told, self.prefill_told = Told(), Told()
        self.thread = EngineThread(self.decode, self.told.deliver)
        self.prefill_thread = EngineThread(self.prefill, self.prefill_told.deliver)
        self.decode.wake = lambda: self.thread.call(lambda: None)
        self.prefill.wake = lambda: self.prefill_thread.call(lambda: None)
        self.thread.start()
        self.prefill_thread.start()

    def add(self, *requests: Request) -> None:
        for request in requests:
            request.prefill_at = (ADDRESS,)
            self.thread.add(request)

    def wait(self, requests: Sequence[Request]) -> dict[str, list[Any]]:
        names = {request.request_id for request in requests}
        self.told.wait_for(lambda: names <= self.told.ended)
        return {name: self.told.answer(name) for name in names}

    def check(self) -> None:
        """Nothing is held on either side, once all is over."""
        for _ in range(2000):
            held = self.thread.call(lambda: self._num_held(self.decode_engine)).result()
            held += self.prefill_thread.call(lambda: self._num_held(self.prefill_engine)).result()
            if not held:
                break
            self.told._changed.acquire()
            self.told._changed.wait(0.01)
            self.told._changed.release()
        for thread, engine in (
            (self.thread, self.decode_engine),
            (self.prefill_thread, self.prefill_engine),
        ):
            thread.call(engine.scheduler.check).result()
            assert not self._num_held(engine), engine.scheduler.imports.tables
            assert engine.scheduler.pool.num_free == engine.scheduler.config.num_blocks
        assert not self.decode._transfers and not self.decode._waiting and not self.decode._coming
        assert not self.prefill._open and not self.prefill._computing

    def close(self) -> None:
        self.decode.close()
        self.prefill.close()
        assert self.thread.stop(PATIENCE_S)
        assert self.prefill_thread.stop(PATIENCE_S)
        assert all(end.join(PATIENCE_S) for ends in self.ends for end in ends)

    def _open(self, address: str, user: LinkUser) -> PairedEnd:
        if self.refuses:
            raise OSError("nobody answers")
        session = self.prefill.session()
        own, other = link_pair(user, session)
        self.ends.append((own, other))
        session.serve(other)
        return own

    def _num_held(self, engine: Engine) -> int:
        scheduler = engine.scheduler
        return scheduler.imports.num_open + len(scheduler.running) + len(scheduler.waiting)


def runner_of(engine: Engine) -> Any:
    executor: Any = engine._computer._executor
    while hasattr(executor, "executor"):
        executor = executor.executor
    return executor
