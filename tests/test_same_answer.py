"""The same answer in any company: one test per axis, bit for bit in tokens and log-probabilities.

Each test runs requests under some circumstance and compares with each request alone, in a fresh
engine that computes every prompt whole. Models: a llama and the one with the most kinds of layers,
each on the reference backend and, in other formats, on the native one.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from fakes import make_request
from native import cpu_backend
from safetensors.numpy import save_file
from scheduler.guesses import Guesses

from duetto.backends.backend import Backend
from duetto.backends.reference import ReferenceBackend
from duetto.checkpoints.checkpoint import load_weights
from duetto.core.config import SchedulerConfig
from duetto.core.request import Request, fan_out
from duetto.engine.engine import Engine
from duetto.models.programs import load_program
from duetto.runner.model_runner import ModelRunner
from duetto.scheduler.scheduler import Scheduler

BLOCK_SIZE = 8
NUM_BLOCKS = 128
MAX_LEN = 192
VOCAB = 101

LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "tie_word_embeddings": True,
}
GEMMA = LLAMA | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 24,
    "query_pre_attn_scalar": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


@dataclass(frozen=True)
class Kind:
    """A config, and how it is computed."""

    config: dict
    backend: str
    dtype: str
    quantization: str | None
    kv_dtype: str

    def __str__(self) -> str:
        formats = (self.dtype, self.quantization, f"{self.kv_dtype}-kv")
        return "-".join([self.config["model_type"], self.backend, *filter(None, formats)])


KINDS = (
    Kind(LLAMA, "reference", "float32", None, "bfloat16"),
    Kind(GEMMA, "reference", "float32", None, "bfloat16"),
    Kind(GEMMA, "cpu", "float32", None, "float16"),
    Kind(LLAMA, "cpu", "bfloat16", None, "bfloat16"),
    Kind(GEMMA, "cpu", "bfloat16", "int8", "int8"),
    Kind(LLAMA, "cpu", "float32", "int4", "float32"),
)


@dataclass(frozen=True)
class Model:
    program: object
    backend: Backend
    kv_dtype: str

    def engine(self, depth=0, drafts=None, proposers=None, **options) -> Engine:
        options = {"num_blocks": NUM_BLOCKS, "max_num_batched_tokens": MAX_LEN} | options
        config = SchedulerConfig(max_model_len=MAX_LEN, block_size=BLOCK_SIZE, **options)
        runner = ModelRunner(
            self.program, self.backend, config.num_blocks, BLOCK_SIZE, self.kv_dtype, proposers
        )
        return Engine(Scheduler(config, drafts=drafts), runner, depth=depth)


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request, tmp_path_factory) -> Model:
    kind: Kind = request.param
    directory: Path = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(kind.config))
    config, program = load_program(directory)
    rng = np.random.default_rng(5)
    save_file(_random_tensors(program, config, rng), directory / "model.safetensors")
    weights = load_weights(directory, program, kind.dtype)
    if kind.backend == "reference":
        return Model(program, ReferenceBackend(program, weights), kind.kv_dtype)
    return Model(program, cpu_backend(program, weights, kind.quantization), kind.kv_dtype)


def _random_tensors(program, config, rng):
    """A tensor for each source; stacked sources are separate, of the rows that each must have."""
    heads, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows_of = {"q_proj": heads, "k_proj": kv, "v_proj": kv}
    tensors = {}
    for spec in program.weights.values():
        for source in spec.sources:
            rows = rows_of.get(source.split(".")[-2], spec.shape[0] // len(spec.sources))
            shape = (rows, *spec.shape[1:])
            scale = 0.3 if len(shape) > 1 else 1.0
            tensors[source] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return tensors


def requests(seed: int = 0) -> list[Request]:
    """Prompts of awkward lengths, some with a shared beginning, under every kind of sampling."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, VOCAB, 50).tolist()
    kinds = (
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.2, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    )
    made = []
    for index, length in enumerate((1, 7, 8, 9, 63, 64, 65, 100)):
        own = rng.integers(0, VOCAB, length).tolist()
        prompt = (shared + own)[:100] if index % 2 else own
        kind = kinds[index % len(kinds)]
        made.append(make_request(f"r{index}", prompt, 24, seed=index, logprobs=3, **kind))
    return made


def answers(engine: Engine, wanted: list[Request], *, together: int = 100) -> dict[str, list]:
    """Run requests, `together` new ones a step; per request its tokens with log-probabilities."""
    found: dict[str, list] = {r.request_id: [] for r in wanted}
    todo = list(wanted)
    while todo or engine.has_work:
        for request in todo[:together]:
            engine.add(request)
        del todo[:together]
        for update in engine.step().updates:
            assert update.error is None
            found[update.request_id] += update.tokens
        engine.scheduler.check()
    return found


@pytest.fixture(scope="module")
def alone(model) -> dict[str, list]:
    found = {}
    for request in requests():
        engine = model.engine(enable_prefix_caching=False)
        found |= answers(engine, [request])
    assert all(len(tokens) == 24 for tokens in found.values())
    return found


def test_batched(model, alone):
    assert answers(model.engine(), requests()) == alone


def test_batched_with_arrivals_in_every_step(model, alone):
    assert answers(model.engine(), requests()[::-1], together=1) == alone


@pytest.mark.parametrize("budget", [1, 5, 8, 31])
def test_chunked(model, alone, budget):
    engine = model.engine(max_num_batched_tokens=budget, enable_prefix_caching=False)
    assert answers(engine, requests()) == alone


def test_chunking_off(model, alone):
    assert answers(model.engine(enable_chunked_prefill=False), requests()) == alone


def test_cached(model, alone):
    engine = model.engine()
    assert answers(engine, requests()) == alone
    before = engine.scheduler.counts.num_hit_tokens
    assert answers(engine, requests()) == alone
    assert engine.scheduler.counts.num_hit_tokens > before + 100


def test_preempted(model, alone):
    engine = model.engine(num_blocks=24, enable_prefix_caching=False)
    assert answers(engine, requests()) == alone
    assert engine.scheduler.counts.num_preemptions >= 3


def test_preempted_and_cached_and_chunked(model, alone):
    engine = model.engine(num_blocks=24, max_num_batched_tokens=13)
    assert answers(engine, requests(), together=2) == alone
    assert engine.scheduler.counts.num_preemptions >= 1


@pytest.mark.parametrize("policy", ["static", "priority"])
def test_other_policies(model, alone, policy):
    engine = model.engine(scheduling_policy=policy, max_num_seqs=3)
    wanted = requests()
    for index, request in enumerate(wanted):
        request.priority = index % 3
    assert answers(engine, wanted) == alone


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 24, "max_num_batched_tokens": 13}], ids=str)
def test_with_steps_in_flight(model, alone, depth, options):
    engine = model.engine(depth=depth, **options)
    assert answers(engine, requests(), together=2) == alone


class Foreseen:
    """Proposes what the answer will be, with a wrong token now and then."""

    needs_hidden = False

    def __init__(self, alone):
        prompts = {r.request_id: len(r.prompt_token_ids) for r in requests()}
        self.answers = {
            name: (prompts[name], [token.token_id for token in tokens])
            for name, tokens in alone.items()
        }
        self.num_proposed = 0

    def propose(self, asked):
        return [self._drafts(request) for request in asked]

    def _drafts(self, request):
        num_prompt, answer = self.answers[request.request_id]
        place = request.start + len(request.token_ids) - num_prompt
        drafts = answer[place : place + request.num_wanted]
        self.num_proposed += len(drafts)
        return tuple((t + 1) % VOCAB if (place + i) % 5 == 4 else t for i, t in enumerate(drafts))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("options", [{}, {"num_blocks": 24, "max_num_batched_tokens": 13}], ids=str)
def test_with_drafts_right_and_wrong(model, alone, depth, options):
    proposer = Foreseen(alone)
    engine = model.engine(depth=depth, drafts=Guesses(3), proposers={"guess": proposer}, **options)
    assert answers(engine, requests(), together=2) == alone
    assert proposer.num_proposed > 40


def test_several_answers_to_one_prompt(model):
    """Each of n answers is what its seed gives alone, and the first is that of n=1."""
    base = make_request("n", list(range(40)), 24, seed=9, logprobs=3, n=4)
    siblings = fan_out(base)
    together = answers(model.engine(), siblings)
    for sibling in fan_out(base):
        single = replace(sibling, sampling=replace(sibling.sampling, n=1))
        engine = model.engine(enable_prefix_caching=False)
        assert answers(engine, [single])[sibling.request_id] == together[sibling.request_id]
    assert siblings[0].seed == base.seed
    assert len({tuple(t.token_id for t in tokens) for tokens in together.values()}) > 1


def test_beside_requests_that_are_aborted_and_fail(model, alone):
    """Neighbours that come, go and break leave no trace."""
    engine = model.engine()
    found: dict[str, list] = {r.request_id: [] for r in requests()}
    for request in requests():
        engine.add(request)
    for step in range(1000):
        if step % 3 == 0:
            engine.add(make_request(f"x{step}", list(range(step % 90 + 1)), 50, seed=step))
        if step % 4 == 3:
            engine.abort(f"x{step - step % 3}")
        for update in engine.step().updates:
            if update.request_id in found:
                found[update.request_id] += update.tokens
        if all(len(tokens) == 24 for tokens in found.values()):
            break
    assert found == alone


def test_prompt_scores(model):
    """The prompt's log-probabilities too: in chunks, in a batch, and cached by another."""

    def scores(engine, request):
        engine.add(make_request("other", list(range(60)), 10))
        engine.add(request)
        found = []
        while engine.has_work:
            for update in engine.step().updates:
                if update.request_id == "scored":
                    found += update.prompt_logprobs
        return found

    def scored():
        return make_request("scored", list(range(70)), 2, prompt_logprobs=2)

    whole = scores(model.engine(), scored())
    assert len(whole) == 69
    assert scores(model.engine(max_num_batched_tokens=7), scored()) == whole
    assert scores(model.engine(num_blocks=14, max_num_batched_tokens=9), scored()) == whole
