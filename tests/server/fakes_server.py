"""A server without a model: the real Engine over an executor that says what a test tells it to."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fakes import ByteCodec
from starlette.applications import Starlette

from duetto.core.batch import (
    RequestResult,
    SampledToken,
    SamplingInput,
    ScheduledBatch,
    ScheduledRequest,
    StepOutput,
    TokenLogprob,
)
from duetto.core.config import SchedulerConfig
from duetto.core.executor import Done
from duetto.engine.engine import Engine
from duetto.engine.speech import Speech
from duetto.engine.thread import in_thread
from duetto.scheduler.scheduler import Scheduler
from duetto.server.app import create_app
from duetto.server.http.serve import bind, make_server
from duetto.server.settings import ServerSettings

MODEL = "fake"
EOS = 256
CODEC = ByteCodec()
CONFIG = SchedulerConfig(
    num_blocks=256, max_model_len=512, block_size=4, max_num_seqs=8, max_num_batched_tokens=64
)


class SpeakingExecutor:
    """Says `text` byte by byte and then ends, or says a letter of its seed for ever.

    `text` may hold multi-byte characters. Each step takes `step_s`, waits for `gate`, and fails if
    `fails` is set. Log-probabilities are -0.5 for the token and -1, -2, … for its successors.
    """

    def __init__(self, text: str | None = None, step_s: float = 0.0) -> None:
        self.text = text
        self.step_s = step_s
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False
        self.num_steps = 0

    def submit(self, batch: ScheduledBatch) -> Done:
        self.gate.wait(10)
        time.sleep(self.step_s)
        self.num_steps += 1
        if self.fails:
            raise RuntimeError("secret detail at 0x7f")
        return Done(StepOutput(tuple(self._result(r) for r in batch.requests)))

    def _result(self, item: ScheduledRequest) -> RequestResult:
        tokens = tuple(self._sample(row) for row in item.rows)
        num_top = item.num_prompt_logprobs
        scores = tuple(_score(target, num_top) for target in item.prompt_logprob_targets)
        return RequestResult(tokens, scores=scores)

    def _sample(self, asked: SamplingInput) -> SampledToken:
        if asked.params.logit_bias:
            token_id = max(asked.params.logit_bias, key=asked.params.logit_bias.__getitem__)
        elif self.text is not None:
            data = self.text.encode()
            at = asked.num_output_tokens
            token_id = data[at] if at < len(data) else EOS
        else:
            token_id = ord("a") + asked.seed % 26
        if token_id in asked.forbidden_token_ids:
            token_id = ord("x")
        wanted = asked.params.logprobs
        return SampledToken(token_id, None if wanted is None else _score(token_id, wanted))


def _score(token_id: int, num_top: int) -> TokenLogprob:
    top = tuple(((token_id + i) % 128, -0.5 - i) for i in range(num_top))
    return TokenLogprob(token_id, -0.5, 1, top)


def make_engine(executor: Any, config: SchedulerConfig = CONFIG) -> Engine:
    return Engine(
        Scheduler(config),
        executor,
        decode=lambda ids, skip: CODEC.decode(ids, skip_special_tokens=skip),
    )


def make_app(
    executor: Any,
    config: SchedulerConfig = CONFIG,
    codec: Any = CODEC,
    roof_time: Any = None,
    speech: Speech = Speech(),  # noqa: B008  # frozen
    grammars: Any = None,
    **settings: Any,
) -> tuple[Starlette, Engine]:
    engine = make_engine(executor, config)
    made = ServerSettings(served_model_name=MODEL, version="1.2.3", **settings)
    app = create_app(
        open_engine=in_thread(engine),
        codec=codec,
        config=config,
        settings=made,
        roof_time=roof_time,
        speech=speech,
        grammars=grammars,
    )
    return app, engine


@contextmanager
def running(app: Starlette, **settings: Any) -> Iterator[str]:
    """Serve on a free port in a thread; yields the base URL."""
    made = ServerSettings(served_model_name=MODEL, **settings)
    server = make_server(app, made, log_level="critical")
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def post(client, path, body):
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def chunks(client, path, body):
    """The decoded events of a stream; checks the framing on the way."""
    reply = client.post(path, json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def wait_until(condition: Any, timeout: float = 5.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def has_all_blocks(engine: Engine) -> bool:
    return not engine.has_work and engine.scheduler.pool.num_free == CONFIG.num_blocks
