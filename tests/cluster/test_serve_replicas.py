"""`duetto serve --replicas` and `duetto router`: what they refuse, and processes that end."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_world import FACTS, replace_struct

from duetto.build import build, build_front
from duetto.cli.door_options import DoorOptions
from duetto.cli.router import router
from duetto.cli.serve import serve
from duetto.cli.serve_workers import wait_for_first
from duetto.core.batch import StepRecord
from duetto.core.config import SchedulerConfig
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.shape import BatchShape, RequestShape
from duetto.demo import demo_model_dir
from duetto.llm import LLM
from duetto.pricing.reuse import LookShare
from duetto.worker_facts import facts_of, model_fingerprint
from duetto.workers_door import (
    LearnedPrices,
    WorkersDoor,
    door_config,
    door_model,
    numerics_in_words,
    worker_prices,
)

ARGS = EngineArgs(max_model_len=256, kv_cache_memory_bytes=2**24)
DEADLINE_S = 120.0


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("--replicas 0", {"replicas": 0}),
        ("--prefill-replicas -1", {"prefill_replicas": -1}),
        ("256 together", {"replicas": 200, "prefill_replicas": 57}),
        ("--router: needs --replicas", {"router": "predicted"}),
        ("--pin: needs --replicas", {"pin": False}),
    ],
)
def test_serve_refuses_in_one_line(words, options):
    with pytest.raises(ConfigError, match=words) as caught:
        serve("no/such/model", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("needs --listen ADDRESS", {}),
        ("--workers 'nowhere': is no address", {"workers": ("nowhere",)}),
        ("an address is there twice", {"workers": ("ipc:///a,ipc:///b", "ipc:///a")}),
        ("no secret", {"workers": ("tcp://10.0.0.1:4000",)}),
        ("--join-timeout", {"listen": "ipc:///x", "join_timeout": -1.0}),
        ("--reuse", {"listen": "ipc:///x", "options": DoorOptions(reuse="what")}),
    ],
)
def test_a_router_refuses_in_one_line(words, options):
    with pytest.raises(ConfigError, match=words) as caught:
        router("no/such/model", **options)
    assert "\n" not in str(caught.value)


def test_a_router_whose_workers_do_not_answer(tmp_path):
    address = f"ipc://{tmp_path}/nobody"
    with pytest.raises(ConfigError, match=r"no worker within 0.5 s.*nobody listens there"):
        router(workers=(address,), join_timeout=0.5, options=DoorOptions(port=0))


@pytest.fixture(scope="module")
def front():
    return build_front(demo_model_dir(), ARGS)


def test_a_door_without_weights_knows_what_one_with_them_does(front):
    built = build(demo_model_dir(), ARGS)
    facts = facts_of(built, "1")
    assert front.name == built.name
    assert front.default_sampling == built.default_sampling
    known = door_model(front, ARGS)
    assert known.fingerprint == facts.model
    assert known.fingerprint == model_fingerprint(built.root, built.model.program, built.codec)
    words = numerics_in_words(facts.numerics)
    model = built.model
    assert words == (model.computed_by, model.dtype, model.quantization, model.kv_dtype)
    shape = BatchShape((RequestShape(16, 0),))
    assert worker_prices(facts, known.program).step_time(shape) > 0


def test_numerics_that_nobody_knows_are_told_as_they_are():
    assert numerics_in_words("n") == ("n", "unknown", "none", "unknown")
    assert numerics_in_words("cpu/avx2/bfloat16/int4/x/float16") == (
        *("cpu/avx2", "bfloat16"),
        *("int4/x", "float16"),
    )


@pytest.mark.parametrize("hardware", [b"", b"{", b'{"name": 3}', b"\xff" * 50])
def test_hardware_that_is_none_is_a_guess(front, hardware):
    program = door_model(front, ARGS).program
    facts = replace_struct(FACTS, hardware=hardware, weight_bytes=-3.0, kv_bytes=1e9)
    shape = BatchShape((RequestShape(16, 0),))
    assert worker_prices(facts, program).step_time(shape) > 0


def test_waits_follow_what_steps_took():
    config = SchedulerConfig(num_blocks=64, max_model_len=512, max_num_batched_tokens=128)
    learned = LearnedPrices(lambda shape: 1e-4 * shape.num_tokens, config, LookShare(1.0, 1.0))
    before = learned.waits.seconds(100, 0, 0, 0)
    shape = BatchShape((RequestShape(100, 0),))
    for _ in range(200):
        learned.observe(StepRecord(0.0, 0.5, 100, 100, 1, 1, 0, 9, 64, 0, 0, 0, shape))
    assert learned.waits.seconds(100, 0, 0, 0) > 10 * before


def test_a_door_has_the_places_of_all_its_workers():
    config = SchedulerConfig(num_blocks=64, max_model_len=512, max_num_seqs=8)
    assert door_config(config, 3).max_num_seqs == 24
    assert door_config(config, 3).context_length == config.context_length


def test_only_prefill_workers_are_a_role_without_its_counterpart(front, monkeypatch):
    door = WorkersDoor(door_model(front, ARGS), "predicted", "1")
    try:
        monkeypatch.setattr(WorkersDoor, "num_prefilling", 1)
        with pytest.raises(ConfigError, match="one of role decode or both is needed"):
            wait_for_first(door, 1, 0.0, "--workers")
    finally:
        door.close()


# --- processes ---------------------------------------------------------------------------------


@contextmanager
def serving(*words):
    command = [sys.executable, "-m", "duetto", *words, "--port=0", "--max-model-len=256"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def url_of(process):
    for line in process.stderr:
        if found := re.search(r"serves \S+ at (\S+)", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # never full
            return found[1]
    raise AssertionError("it ended without serving")


def ask(url, prompt):
    body = {"model": "duetto-demo", "prompt": prompt, "max_tokens": 12, "seed": 3}
    data = json.dumps({**body, "ignore_eos": True}).encode()
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/completions", data, head)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["text"]


def children_of(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return [int(child) for child in found if b"worker" in _command(int(child))]


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.oracle  # takes long: three processes with a model
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_outlives_its_workers_and_they_do_not_outlive_it():
    prompts = [f"The key of room {i} is" for i in range(6)]
    llm = LLM(demo_model_dir(), max_model_len=256)
    recommended = llm.get_default_sampling_params()
    params = replace(recommended, max_tokens=12, seed=3, ignore_eos=True)
    wanted = [answer.outputs[0].text for answer in llm.generate(prompts, params)]
    with serving("serve", "--replicas=2") as process:
        url = url_of(process)
        assert [ask(url, prompt) for prompt in prompts] == wanted
        workers = children_of(process.pid)
        assert len(workers) == 2
        shares = [os.sched_getaffinity(worker) for worker in workers]
        if len(os.sched_getaffinity(0)) > 1:
            assert not shares[0] & shares[1]
        os.kill(workers[0], signal.SIGKILL)
        assert [ask(url, prompt) for prompt in prompts] == wanted  # by the other one
        deadline = time.monotonic() + DEADLINE_S
        while len(now := children_of(process.pid)) < 2 or workers[0] in now:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not any(_command(worker) for worker in now)
