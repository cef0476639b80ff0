"""What is refused before a draft is asked for anything, with both sides named."""

import json
import shutil
from dataclasses import replace

import pytest

from duetto.backends.cpu.native import native
from duetto.backends.reference import ReferenceBackend
from duetto.build import build
from duetto.checkpoints.same_tokenizer import difference
from duetto.checkpoints.tokenizer import load_tokenizer
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.core.speculation import SpeculativeConfig
from duetto.demo import demo_model_dir
from duetto.models.programs import load_program
from duetto.runner import load as runner_load
from duetto.runner.load import Companion, load_model, plan_model
from duetto.runner.proposers.load import check_methods, plan_companion, plan_draft

READER, DRAFT = "duetto-demo", "duetto-demo-draft"
MIB = 2**20


@pytest.fixture(scope="module")
def other_draft(tmp_path_factory):
    """The demo draft, of whose tokenizer a test may change what it likes."""

    def make(change):
        directory = tmp_path_factory.mktemp("draft") / "copy"
        shutil.copytree(demo_model_dir(DRAFT), directory)
        file = directory / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        change(tokenizer)
        file.write_text(json.dumps(tokenizer))
        return directory

    return make


def refusal(**args):
    with pytest.raises(ConfigError) as caught:
        build(READER, EngineArgs(backend="reference", kv_cache_memory_bytes=8 * MIB, **args))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def swap_two_tokens(tokenizer):
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def make_one_plain(tokenizer):
    tokenizer["added_tokens"][0]["special"] = False


@pytest.mark.parametrize("change", [swap_two_tokens, make_one_plain])
def test_another_tokenizer(other_draft, change):
    message = refusal(speculative_model=str(other_draft(change)))
    assert message.startswith("--speculative-config: the draft model ")
    assert "has another tokenizer: token " in message
    assert "in the model's tokenizer and " in message and "in the draft's" in message


def test_the_same_tokenizer_is_no_difference(other_draft):
    same = load_tokenizer(other_draft(lambda tokenizer: None), vocab_size=2000)  # other padding
    assert difference(load_tokenizer(demo_model_dir(READER)), same) is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"speculative_config": '{"method": "nrgam"}'}, ["'nrgam' is not one of", "ngram"]),
        ({"speculative_config": {"method": "eagle", "model": "x"}}, ["eagle", "Duetto has"]),
        ({"speculative_model": ""}, ["--speculative-model: must be"]),
        ({"speculative_model": "no/such/place"}, ["the draft model: no/such/place: "]),
        (
            {"speculative_config": {"method": "ngram"}, "max_model_len": 16},
            ["num_speculative_tokens 16 of method ngram", "the model's context, 16 tokens"],
        ),
        (
            {"speculative_config": {"model": DRAFT, "max_model_len": 8}},
            [f"the context of the draft model {DRAFT}, 8 tokens"],
        ),
        (
            {"speculative_config": {"model": DRAFT, "max_model_len": 4096}},
            [f"the draft model {DRAFT}: --max-model-len", "2048"],
        ),
        (
            {"speculative_config": {"model": DRAFT, "quantization": "int8"}},
            [f"the draft model {DRAFT}", "int8 and the reference backend"],
        ),
        (
            {"speculative_config": {"model": DRAFT, "kv_cache_dtype": "fp3"}},
            [f"the draft model {DRAFT}: --kv-cache-dtype: 'fp3' is not one of"],
        ),
    ],
)
def test_what_does_not_fit_together(args, words):
    message = refusal(**args)
    assert message.startswith("--speculative-")
    for each in words:
        assert each in message


def test_a_draft_that_does_not_fit_into_memory(monkeypatch):
    weights = load_program(demo_model_dir(READER))[1].num_parameters * 4
    monkeypatch.setattr(runner_load, "available_memory_bytes", lambda: weights + 4 * MIB)
    message = refusal(speculative_model=DRAFT)
    assert f"the draft model {DRAFT}: takes " in message and "MiB with its weights" in message
    assert "and 4.0 MiB are left beside the model's own weights" in message


def test_memory_that_is_short_beside_a_draft_names_it_and_what_it_takes(monkeypatch):
    draft, _ = draft_companion(block_size=32)
    takes = f"(--speculative-config: the draft model {DRAFT} takes "
    both = ["MiB with its weights, and", f"{64 * draft.block_bytes / MIB:.1f} MiB of KV beside 64"]
    free = load_program(demo_model_dir(READER))[1].num_parameters * 4
    free += draft.fixed_bytes + 2 * MIB
    monkeypatch.setattr(runner_load, "available_memory_bytes", lambda: free)
    for room in ({"kv_cache_memory_bytes": MIB}, {}):
        with pytest.raises(ConfigError) as caught:
            build(
                READER,
                EngineArgs(
                    backend="reference",
                    speculative_model=DRAFT,
                    max_model_len=2048,
                    max_num_seqs=4,
                    **room,
                ),
            )
        message = str(caught.value)
        assert message.startswith("--max-model-len 2048: ") and takes in message
        assert all(each in message for each in both), message


def test_a_model_that_does_not_fit_alone_is_not_the_drafts_fault(monkeypatch):
    monkeypatch.setattr(runner_load, "available_memory_bytes", lambda: MIB)
    with pytest.raises(ConfigError, match="enough for 0 tokens"):
        build(READER, EngineArgs(backend="reference", speculative_model=DRAFT))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("weights", f"--speculative-config: the draft model {DRAFT}: the system refuses "),
        ("kv", f"the system refuses 8257536 bytes for the KV .*draft model {DRAFT} takes "),
    ],
)
def test_memory_that_the_system_refuses_names_the_draft(monkeypatch, part, words):
    num_loaded = 0

    def refuse(*_):
        nonlocal num_loaded
        num_loaded += 1
        if num_loaded == 2:  # of weights the draft's are second, of KV the model's
            raise MemoryError
        return plain(*_)

    place, name = (native, "Arena") if part == "weights" else (ReferenceBackend, "allocate_kv")
    plain = getattr(place, name)
    monkeypatch.setattr(place, name, refuse)
    backend = "cpu" if part == "weights" else "reference"
    args = EngineArgs(backend=backend, speculative_model=DRAFT, kv_cache_memory_bytes=12 * MIB)
    with pytest.raises(ConfigError, match=words):
        build(READER, args)


def draft_companion(block_size=16, **options):
    config = SpeculativeConfig.parse({"model": DRAFT, **options})
    args = EngineArgs(backend="reference", block_size=block_size, max_num_seqs=4)
    draft = plan_draft(demo_model_dir(DRAFT), config.draft_model, args)
    return draft, plan_companion(config, draft, 4)


def test_both_arenas_fit_into_the_memory_for_kv():
    config, program = load_program(demo_model_dir(READER))
    draft, companion = draft_companion()
    args = EngineArgs(backend="reference", block_size=16, kv_cache_memory_bytes=64 * MIB)
    alone = plan_model(config, program, args)
    both = plan_model(config, program, args, companion=companion)
    own = alone.loader.kv_block_bytes(16, alone.kv_dtype)
    assert draft.block_bytes == own // 2  # half of the layers
    assert both.kv.num_blocks == 64 * MIB // (own + draft.block_bytes) < alone.kv.num_blocks
    assert draft.num_scratch_blocks == 4
    two_each, _ = draft_companion(block_size=8, num_speculative_tokens=9)
    assert two_each.num_scratch_blocks == 8
    assert companion.fixed_bytes == draft.loader.weight_bytes + 4 * draft.block_bytes


def test_methods_that_cost_no_memory_change_nothing():
    companion = plan_companion(SpeculativeConfig.parse({"method": "ngram"}), None, 4)
    assert isinstance(companion, Companion)
    assert (companion.fixed_bytes, companion.block_bytes) == (0, 0)


def test_an_arena_that_the_system_refuses():
    config, program = load_program(demo_model_dir(READER))
    _, companion = draft_companion()
    plan = plan_model(config, program, EngineArgs(backend="reference", block_size=16))
    plan = replace(plan, kv=replace(plan.kv, num_blocks=2**40))
    with pytest.raises(
        ConfigError, match=r"\d+ bytes .* of the draft model duetto-demo-draft are more than"
    ):
        companion.load(plan, None)


def test_a_draft_computes_on_the_models_own_threads(monkeypatch):
    started = []

    def start(num_threads):
        started.append(num_threads)
        return pool_of(num_threads)

    pool_of = native.Pool
    monkeypatch.setattr(native, "Pool", start)
    args = EngineArgs(
        backend="cpu", threads=2, speculative_model=DRAFT, kv_cache_memory_bytes=8 * MIB
    )
    build(READER, args)
    assert started.count(2) == 1  # who packs weights has pools of one


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_progress_is_that_of_the_model_and_its_draft(backend):
    args = EngineArgs(backend=backend, block_size=16, kv_cache_memory_bytes=8 * MIB)
    config = SpeculativeConfig.parse({"model": DRAFT})
    draft = plan_draft(demo_model_dir(DRAFT), config.draft_model, args)
    told = []
    loaded = load_model(
        demo_model_dir(READER),
        args,
        on_progress=lambda *each: told.append(each),
        companion=plan_companion(config, draft, 4),
    )
    own, both = loaded.weight_bytes, loaded.weight_bytes + draft.loader.weight_bytes
    assert {total for _, total in told} == {both}
    done = [each for each, _ in told]
    assert done == sorted(done) and own in done and done[-1] == both
    assert len([each for each in done if own < each < both]) > 1


class NeedsHidden:
    needs_hidden = True

    def propose(self, requests):
        raise AssertionError


def test_a_method_that_the_backend_lacks():
    with pytest.raises(ConfigError, match="method eagle reads hidden rows of the model, which the"):
        check_methods({"eagle": NeedsHidden()}, "cpu")
