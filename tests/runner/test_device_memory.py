"""A device without memory for a step: that request ends with an error, the engine goes on."""

from typing import Any

from fake_device import FakeDevice, FakeStarted
from fakes import make_request
from small_models import BLOCK_SIZE, LLAMA, Kind, make_model

from duetto.backends.backend import StepArrays
from duetto.core.config import SchedulerConfig
from duetto.core.request import FinishReason
from duetto.engine.engine import Engine
from duetto.runner.device_runner import DeviceRunner
from duetto.scheduler.scheduler import Scheduler

HUNGRY = 7  # a token whose steps take too much
KIND = Kind(LLAMA, "cpu", "float32", None, "float32", is_device=True)


class OutOfMemoryError(RuntimeError):
    """As torch's is named, and derived."""


class SmallDevice(FakeDevice):
    num_refused = 0

    def start(self, step: StepArrays, *given: Any, **named: Any) -> FakeStarted:
        if HUNGRY in step.token_ids:
            self.num_refused += 1
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().start(step, *given, **named)


def run(engine: Engine) -> dict[str, tuple[list[int], FinishReason | None, str | None]]:
    tokens: dict[str, list[int]] = {}
    ends: dict[str, tuple[FinishReason | None, str | None]] = {}
    while engine.has_work:
        for update in engine.step().updates:
            own = tokens.setdefault(update.request_id, [])
            own += [token.token_id for token in update.tokens]
            if update.finish_reason is not None:
                ends[update.request_id] = update.finish_reason, update.error
    return {name: (tokens[name], *ends[name]) for name in ends}


def test_a_step_that_has_no_room_ends_its_request_alone(caplog, tmp_path):
    model = make_model(KIND, tmp_path)
    prompts = {"a": [1, 2, 3], "hungry": [4, HUNGRY, 5], "b": [9, 8]}

    def answers(device: FakeDevice, *names: str) -> dict[str, Any]:
        runner = DeviceRunner(model.program, device, 64, BLOCK_SIZE, model.kv_dtype)
        config = SchedulerConfig(max_model_len=64, num_blocks=64, block_size=BLOCK_SIZE)
        engine = Engine(Scheduler(config), runner, depth=1)
        for name in names:
            engine.add(make_request(name, prompts[name], 5, temperature=0))
        return run(engine)

    device = SmallDevice(model.backend)
    together = answers(device, *prompts)
    assert device.num_refused >= 1
    tokens, reason, error = together.pop("hungry")
    assert (tokens, reason) == ([], FinishReason.ERROR)
    assert error is not None and "the log says why" in error
    assert "CUDA out of memory" in caplog.text
    assert together == answers(FakeDevice(model.backend), "a", "b")
    assert all(len(tokens) == 5 for tokens, _, _ in together.values())
