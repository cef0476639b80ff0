"""The same embedding in any company, bit for bit: alone, batched, chunked, cached, preempted, in
flight. And what it is, by hand.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from fakes import make_request
from msgspec.msgpack import decode, encode
from small_models import BLOCK_SIZE, KINDS, LLAMA, VOCAB, Kind, Model, make_embedding_model

from duetto.checkpoints.checkpoint import load_weights
from duetto.core.batch import ScheduledRequest, StepOutput
from duetto.core.embeddings import PoolingParams
from duetto.core.errors import InvalidRequest
from duetto.core.request import FinishReason, Request
from duetto.engine.engine import Engine
from duetto.models.programs import load_program
from duetto.program.rewrites.headless import headless
from duetto.program.shape import BatchShape, Precision, RequestShape
from duetto.runner.pooling import pooled

UNTIED = LLAMA | {"tie_word_embeddings": False}
EMBEDDING_KINDS = (*KINDS, Kind(UNTIED, "cpu", "float32", None, "float32"))


@pytest.fixture(scope="module", params=EMBEDDING_KINDS, ids=str)
def model(request, tmp_path_factory) -> Model:
    return make_embedding_model(request.param, tmp_path_factory.mktemp("model"))


def pooling_request(name: str, prompt, dimensions: int | None = None, **more) -> Request:
    request = make_request(name, prompt, 1, **more)
    return replace(request, pooling=PoolingParams(dimensions=dimensions))


def requests() -> list[Request]:
    """Texts of awkward lengths, some of which begin alike."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, VOCAB, 40).tolist()
    made = []
    for index, length in enumerate((1, 7, 8, 9, 63, 64, 65, 100)):
        own = rng.integers(0, VOCAB, length).tolist()
        made.append(pooling_request(f"r{index}", (shared + own)[:100] if index % 2 else own))
    return made


def embeddings(engine: Engine, wanted: list[Request], *, together: int = 100) -> dict[str, bytes]:
    """Run requests, `together` new ones a step."""
    found: dict[str, bytes] = {}
    todo = list(wanted)
    while todo or engine.has_work:
        for request in todo[:together]:
            engine.add(request)
        del todo[:together]
        for update in engine.step().updates:
            assert (update.error, update.finish_reason) == (None, FinishReason.STOP)
            assert not update.tokens and update.request_id not in found
            found[update.request_id] = update.embedding
        engine.scheduler.check()
    return found


def pooling_engine(model: Model, **options) -> Engine:
    return model.engine(is_pooling=True, **options)


@pytest.fixture(scope="module")
def alone(model) -> dict[str, bytes]:
    found = {}
    for request in requests():
        found |= embeddings(pooling_engine(model, at_once=True), [request])
    return found


def numbers(embedding: bytes) -> np.ndarray:
    return np.frombuffer(embedding, "<f4")


def test_batched(model, alone) -> None:
    assert embeddings(pooling_engine(model), requests()) == alone


def test_cut_into_chunks_beside_others(model, alone) -> None:
    engine = pooling_engine(model, max_num_batched_tokens=13)
    assert embeddings(engine, requests(), together=2) == alone


def test_with_a_cached_beginning(model, alone) -> None:
    engine = pooling_engine(model)
    assert embeddings(engine, requests()) == alone
    again = [replace(r, request_id=r.request_id + "x") for r in requests()]
    assert list(embeddings(engine, again).values()) == list(alone.values())
    assert engine.scheduler.counts.num_hit_tokens > 0


def test_preempted(model, alone) -> None:
    """It has its blocks from the start, and is the last of those that run; so it is told to go."""
    engine = pooling_engine(model, max_num_batched_tokens=24)
    request = requests()[5]
    engine.add(request)
    engine.step()
    engine.scheduler._room.preempt(request)
    engine.scheduler.forget_cached()
    found = embeddings(engine, requests()[4:5])
    assert found == {name: alone[name] for name in ("r4", "r5")}
    assert engine.scheduler.counts.num_preemptions == 1


def test_with_steps_in_flight(model, alone) -> None:
    engine = pooling_engine(model, depth=2, max_num_batched_tokens=13)
    assert embeddings(engine, requests()) == alone


def test_fewer_dimensions_are_the_first_ones_at_length_1(model, alone) -> None:
    (whole,) = (numbers(alone["r4"]),)
    assert np.linalg.norm(whole.astype(np.float64)) == pytest.approx(1, abs=1e-6)
    cut = replace(requests()[4], pooling=PoolingParams(dimensions=5))
    (embedding,) = embeddings(pooling_engine(model), [cut]).values()
    first = whole[:5].astype(np.float64)
    assert numbers(embedding) == pytest.approx(first / np.linalg.norm(first), rel=1e-6)


def test_the_longest_text_fills_every_block(model) -> None:
    engine = pooling_engine(model, num_blocks=4)
    longest = 4 * BLOCK_SIZE
    assert embeddings(engine, [pooling_request("long", [3] * longest)])
    with pytest.raises(InvalidRequest, match=f"maximum context length is {longest} tokens.* 33 "):
        engine.add(pooling_request("longer", [3] * (longest + 1)))


def test_what_generates_and_what_embeds_do_not_mix(model) -> None:
    with pytest.raises(InvalidRequest, match="served for embeddings"):
        pooling_engine(model).add(make_request("r", [1, 2]))
    with pytest.raises(InvalidRequest, match="served to generate"):
        model.engine().add(pooling_request("r", [1, 2]))


def test_by_hand(tmp_path) -> None:
    """A llama in numpy, without KV, chunks or kernels."""
    model = make_embedding_model(KINDS[0], tmp_path)
    weights = load_weights(tmp_path / "own", model.program, "float32")
    ids = np.random.default_rng(3).integers(0, VOCAB, 21)
    x, heads, kv_heads, dim = weights["model.embed_tokens.weight"][ids], 4, 2, 12
    angles = np.arange(21)[:, None] * 10_000.0 ** (-np.arange(0, dim, 2) / dim)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weights[f"{name}.weight"]

    def rotated(x):  # [tokens, heads, dim]
        a, b = np.split(x, 2, axis=-1)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    for layer in range(2):
        name = f"model.layers.{layer}"
        qkv = norm(x, f"{name}.input_layernorm") @ weights[f"{name}.self_attn.q_proj.weight"].T
        q, k, v = np.split(qkv.reshape(21, -1, dim), [heads, heads + kv_heads], axis=1)
        k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (rotated(k), v))
        scores = np.einsum("qhd,khd->hqk", rotated(q), k) / np.sqrt(dim)
        scores[:, ~np.tri(21, dtype=bool)] = -np.inf
        likely = np.exp(scores - scores.max(-1, keepdims=True))
        likely /= likely.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", likely, v).reshape(21, -1)
        x = x + attended @ weights[f"{name}.self_attn.o_proj.weight"].T
        made = norm(x, f"{name}.post_attention_layernorm")
        gate, up = np.split(made @ weights[f"{name}.mlp.gate_proj.weight"].T, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{name}.mlp.down_proj.weight"].T
    wanted = norm(x, "model.norm")[-1]
    (got,) = embeddings(pooling_engine(model), [pooling_request("r", ids.tolist())]).values()
    assert numbers(got) == pytest.approx(wanted / np.linalg.norm(wanted), abs=5e-3)  # KV in bf16


def test_a_state_without_a_direction_is_an_error() -> None:
    for state in (np.zeros(4, np.float32), np.array([1, np.nan, 0, 0], np.float32)):
        assert "hidden state" in (pooled(PoolingParams(), state).error or "")


def test_no_head_is_held_or_priced(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(UNTIED))
    _, whole = load_program(tmp_path)
    program, shape = headless(whole), BatchShape((RequestShape(9, 0),))
    head = 2 * VOCAB * UNTIED["hidden_size"]
    assert whole.cost(shape, Precision()).flops - program.cost(shape, Precision()).flops == head
    assert "lm_head.weight" not in program.weights
    assert whole.num_parameters - program.num_parameters == head // 2


def test_what_crosses_to_an_executor_is_plain(model) -> None:
    seen = []

    class Recording:
        def __init__(self, runner) -> None:
            self._runner = runner

        def submit(self, batch):
            seen.append((batch, self._runner.submit(batch)))
            return seen[-1][1]

    engine = pooling_engine(model, max_num_batched_tokens=50, executor=Recording)
    embeddings(engine, [pooling_request("r", [1] * 60, 3)])
    for batch, done in seen:
        assert decode(encode(batch.requests), type=tuple[ScheduledRequest, ...]) == batch.requests
        output = done.result()
        assert decode(encode(output), type=StepOutput) == output
    assert [bool(done.result().results[0].embedding) for _, done in seen] == [False, True]
