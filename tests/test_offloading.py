"""KV tiers through the doors: what the flags mean, what is said, and a second start."""

import logging
from pathlib import Path

import pytest

from duetto import LLM, SamplingParams
from duetto.backends.cpu.native import why_unavailable
from duetto.core.cache_control import CachedText, Drop, LookUp
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError
from duetto.scheduler.reuse import text_hashes

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = {"prompt_token_ids": [7 * i % 90 + 1 for i in range(100)]}
OTHER = {"prompt_token_ids": [11 * i % 90 + 1 for i in range(100)]}
BACKENDS = ["reference"] if why_unavailable() else ["reference", "cpu"]


def answer(llm: LLM, prompt: dict = PROMPT) -> tuple[int, ...]:
    return tuple(llm.generate(prompt, GREEDY)[0].outputs[0].token_ids)


def tiers(llm: LLM):
    return llm.engine.scheduler.tiers


def let_it_write(llm: LLM) -> None:
    disk = llm._built.model.tiers.disk
    assert disk.flush(20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_start_finds_what_the_first_one_computed(tiny_model, tmp_path, backend):
    options = {"backend": backend, "kv_offloading_disk": str(tmp_path / "kv"), "block_size": 16}
    with LLM(tiny_model, backend=backend, block_size=16) as plain:
        expected = answer(plain)
    with LLM(tiny_model, **options) as first:
        assert answer(first) == expected
        let_it_write(first)
    with LLM(tiny_model, **options) as second:
        assert any("6 blocks of this model found" in note for note in second._built.notes)
        assert answer(second) == expected
        assert tiers(second).counts.num_read == 6 == tiers(second).counts.num_loaded
        assert second.engine.scheduler.counts.num_hit_tokens == 96


def test_what_is_dropped_is_computed_by_a_second_start(tiny_model, tmp_path):
    options = {"backend": "reference", "kv_offloading_disk": str(tmp_path), "block_size": 16}
    with LLM(tiny_model, **options) as first:
        expected = answer(first)
        answer(first, OTHER)
        let_it_write(first)
        num_files = len([*tmp_path.iterdir()])
        assert first.engine.control(Drop(b"", text(first))).num_in_tiers == 6
        while first.engine.has_work:
            first.engine.step()
        let_it_write(first)
        assert 0 < len([*tmp_path.iterdir()]) < num_files
    with LLM(tiny_model, **options) as second:
        found = second.engine.control(LookUp(text(second)))
        assert not found.ranges and not found.num_loadable
        assert second.engine.control(LookUp(text(second, OTHER))).num_loadable == 96
        assert answer(second) == expected
        assert tiers(second).counts.num_read == 0


def text(llm: LLM, prompt: dict = PROMPT) -> CachedText:
    ids = tuple(prompt["prompt_token_ids"])
    return CachedText(len(ids), tuple(text_hashes(ids[:96], llm.config, b"")))


@pytest.mark.parametrize(
    "other", [{"kv_cache_dtype": "float16"}, {"block_size": 8}, {"dtype": "float32"}], ids=str
)
def test_kv_of_other_numerics_is_not_found(tiny_model, tmp_path, other):
    options = {"backend": "reference", "block_size": 16, "kv_offloading_disk": str(tmp_path)}
    with LLM(tiny_model, **options) as first:
        answer(first)
        let_it_write(first)
    with LLM(tiny_model, **options | other) as second:
        assert any("0 blocks of this model found" in note for note in second._built.notes)


def test_kv_of_another_checkpoint_is_not_found(tiny_model, tmp_path):
    options = {"backend": "reference", "block_size": 16, "kv_offloading_disk": str(tmp_path)}
    with LLM(tiny_model, **options) as first:
        answer(first)
        let_it_write(first)
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(tiny_model).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = next(other.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with LLM(other, **options) as second:
        assert not tiers(second)._on_disk


def test_ram_beside_a_cache_that_is_too_small(tiny_model):
    with LLM(tiny_model, backend="reference", block_size=16) as plain:
        expected = answer(plain), answer(plain, OTHER)
        block_bytes = plain._built.model.kv_memory_bytes // plain.config.num_blocks
    small = {"kv_cache_memory_bytes": 9 * block_bytes, "max_model_len": 120, "block_size": 16}
    with LLM(tiny_model, backend="reference", kv_offloading_size=0.01, **small) as llm:
        assert any("10.2 MiB of RAM" in note for note in llm._built.notes)
        for _ in range(3):
            assert (answer(llm), answer(llm, OTHER)) == expected
        assert tiers(llm).counts.num_loaded >= 12
        llm.reset_prefix_cache()
        before = tiers(llm).counts.num_loaded
        assert answer(llm) == expected[0] and tiers(llm).counts.num_loaded == before


def test_a_folder_that_cannot_be_used_is_told_and_the_answer_is_there(tiny_model, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        with LLM(tiny_model, backend="reference", block_size=16) as plain:
            expected = answer(plain)
        path = str(tmp_path / "file")
        with LLM(tiny_model, backend="reference", block_size=16, kv_offloading_disk=path) as llm:
            assert answer(llm) == expected
            let_it_write(llm)
            assert answer(llm, OTHER)
    assert "cannot be used for KV" in caplog.text
    assert sum("takes no more KV" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_offloading_size": 0}, "--kv-offloading-size: must be GiB above 0, up to 1,048,576"),
        ({"kv_offloading_size": "1"}, "--kv-offloading-size: must be GiB above 0"),
        ({"kv_offloading_size": float("nan")}, "--kv-offloading-size: must be GiB above 0"),
        ({"kv_offloading_disk": ""}, "--kv-offloading-disk: must be a folder, not ''"),
        ({"kv_offloading_disk": 3}, "--kv-offloading-disk: must be a folder, not 3"),
        ({"kv_offloading_disk_size": 1.0}, "there is no --kv-offloading-disk"),
        (
            {"kv_offloading_disk": "kv", "kv_offloading_disk_size": -1},
            "--kv-offloading-disk-size: must be GiB above 0, up to 1,048,576, not -1",
        ),
        (
            {"kv_offloading_size": 1.0, "enable_prefix_caching": False},
            "keep what --enable-prefix-caching finds",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineArgs(**options)


def test_ram_that_holds_no_blocks_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="--kv-offloading-size 1e-09: must hold 4 blocks"):
        LLM(tiny_model, backend="reference", kv_offloading_size=1e-9)
