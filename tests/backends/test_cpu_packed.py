"""The arena of packed weights: where they lie, what is in it, and that a cached one is the same."""

import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from native import Whole, pool, whole
from numpy.typing import NDArray
from oracle.cases import CASES_BY_NAME, prompts
from oracle.feed import Feed
from oracle.fixture_io import write_checkpoint

from duetto.backends.cpu.backend import CpuBackend
from duetto.backends.cpu.cache import PackedCache
from duetto.backends.cpu.formats import choose_formats, without_loss
from duetto.backends.cpu.native import choose_isa, native
from duetto.backends.cpu.packed import (
    TILE_ROWS,
    ArenaLayout,
    NotCoded,
    NotFinite,
    PackedWeights,
    lay_out,
    load_packed,
)
from duetto.checkpoints import checkpoint as checkpoint_module
from duetto.checkpoints.checkpoint import Checkpoint, Weights, load_weights
from duetto.models.programs import load_program
from duetto.program.program import Program

NAMES = ("llama-biases", "gemma2", "qwen3-biases-window", "phi3")
KINDS = [(None, "bfloat16"), (None, "float32"), (None, "float16"), ("int8", "float32")]
KINDS += [("int4", "bfloat16")]


@cache
def loaded(name: str, dtype: Any) -> tuple[Program, Weights]:
    with TemporaryDirectory() as directory:
        write_checkpoint(CASES_BY_NAME[name], Path(directory))
        _, program = load_program(Path(directory))
        return program, load_weights(Path(directory), program, dtype)


def layout_of(name: str, dtype: Any, quantization: Any = None) -> ArenaLayout:
    program = loaded(name, dtype)[0]
    return lay_out(program, choose_formats(program, dtype, quantization))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("quantization", "dtype"), KINDS)
def test_every_weight_has_a_place_of_its_own(name: str, quantization: Any, dtype: Any) -> None:
    layout = layout_of(name, dtype, quantization)
    assert set(layout.places) == set(loaded(name, dtype)[0].weights)
    end = 0
    for place in layout.places.values():
        assert place.start == end
        assert place.start % 64 == place.data_bytes % 64 == place.scale_bytes % 64 == 0
        end += place.data_bytes + place.scale_bytes
    assert end == layout.num_bytes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("quantization", "dtype"), KINDS)
def test_what_is_unpacked_is_what_was_packed(name: str, quantization: Any, dtype: Any) -> None:
    weights = loaded(name, dtype)[1]
    packed = load_packed(
        layout_of(name, dtype, quantization), lambda: whole(weights), pool(2), None, ""
    )[0]
    assert packed.matrices.keys() | packed.vectors.keys() == weights.keys()
    for key, vector in packed.vectors.items():
        np.testing.assert_array_equal(vector, weights[key].astype(np.float32))
    for key, matrix in packed.matrices.items():
        want = weights[key].astype(np.float32)
        got = matrix.unpack(choose_isa())
        if matrix.format in ("f32", "bf16"):
            np.testing.assert_array_equal(got, want)
        else:  # half a step; bf16 scales are chosen so that nothing is clipped
            steps = {"int8": 127, "int4": 7}[matrix.format]
            most = np.abs(want).max(axis=1, keepdims=True) / steps * (0.5 + 2**-7)
            tolerated = most if matrix.format == "int8" else 3 * most  # least squares clips a few
            assert (np.abs(got - want) <= tolerated + 1e-7).all()


def logits(program: Program, packed: PackedWeights) -> NDArray[np.float32]:
    feed = Feed(CpuBackend(program, packed, pool(2), choose_isa()), 2)
    return np.concatenate(feed.in_chunks([prompts()[4], prompts()[1]], 10**6))


@pytest.mark.parametrize("name", NAMES)
def test_twelve_bits_compute_the_same_bits_as_sixteen(name: str) -> None:
    program, weights = loaded(name, "bfloat16")
    formats = choose_formats(program, "bfloat16")
    plain, coded = (
        load_packed(lay_out(program, each), lambda: whole(weights), pool(2), None, "")[0]
        for each in (formats, without_loss(formats))
    )
    np.testing.assert_array_equal(logits(program, coded), logits(program, plain))
    for key, matrix in coded.matrices.items():
        assert matrix.format == "bf12"
        np.testing.assert_array_equal(matrix.unpack(choose_isa()), weights[key].astype(np.float32))


def test_weights_of_too_many_exponents_are_told_all_at_once() -> None:
    program, weights = loaded("phi3", "bfloat16")
    name, other = [name for name, spec in program.weights.items() if len(spec.shape) == 2][:2]
    wild = dict(weights)
    for key in (name, other):
        columns = np.arange(weights[key].shape[1], dtype=np.float32)
        wild[key] = weights[key] * np.float32(2) ** (columns % 60 - 30)
    layout = lay_out(program, without_loss(choose_formats(program, "bfloat16")))
    with pytest.raises(NotCoded) as raised:
        load_packed(layout, lambda: whole(wild), pool(2), None, "")
    assert raised.value.names == {name, other}


@pytest.mark.parametrize(("quantization", "dtype"), KINDS)
def test_a_second_start_reads_no_weight_and_computes_the_same_bits(
    tmp_path: Path, quantization: Any, dtype: Any
) -> None:
    program, weights = loaded("gemma2", dtype)
    layout, packed_cache = layout_of("gemma2", dtype, quantization), PackedCache(tmp_path)

    def never() -> Iterator[Any]:
        raise AssertionError("the weights were read")

    first, notes = load_packed(layout, lambda: whole(weights), pool(2), packed_cache, "k")
    again, again_notes = load_packed(layout, never, pool(2), packed_cache, "k")
    assert notes == again_notes == []
    np.testing.assert_array_equal(logits(program, again), logits(program, first))


@pytest.mark.parametrize(("quantization", "dtype"), KINDS)
def test_parts_of_weights_make_the_same_arena(
    tmp_path: Path, quantization: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(CASES_BY_NAME["phi3"], tmp_path)
    layout, arenas = layout_of("phi3", dtype, quantization), []
    for part_bytes in (1, 64 * 64 * 4 + 1, 1 << 30):  # a tile at a time, nearly two, everything
        monkeypatch.setattr(checkpoint_module, "_PART_BYTES", part_bytes)
        with Checkpoint(tmp_path, loaded("phi3", dtype)[0]) as checkpoint:
            kept = PackedCache(tmp_path / str(part_bytes))

            def weights() -> Any:
                return checkpoint.parts(dtype, TILE_ROWS)

            load_packed(layout, weights, pool(2), kept, "k")
        arenas.append(np.empty(layout.num_bytes, np.uint8))
        assert kept.read("k", arenas[-1])
    np.testing.assert_array_equal(arenas[0], arenas[2])
    np.testing.assert_array_equal(arenas[1], arenas[2])


def test_a_number_that_is_none_is_told_with_its_rows() -> None:
    weights = loaded("phi3", "float32")[1]
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        broken = {key: array.copy() for key, array in weights.items()}
        broken[name].reshape(-1)[-1] = np.nan
        for quantization in (None, "int8"):
            layout = layout_of("phi3", "float32", quantization)
            with pytest.raises(NotFinite) as caught:
                load_packed(layout, lambda: whole(broken), pool(2), None, "")  # noqa: B023
            assert caught.value.rows[:2] == (name, 0)


def test_of_several_threads_the_first_part_that_is_wrong_is_told() -> None:
    """Though a later one is found before, and memory that parts are read into is used again."""
    weights = {key: array.copy() for key, array in loaded("phi3", "float32")[1].items()}
    first, *others = (key for key, array in weights.items() if array.ndim == 2)
    later_is_read = threading.Event()

    class InScratch(Whole):
        def read(self, scratch: NDArray[np.uint8]) -> NDArray[Any]:
            if self.name == first:
                assert later_is_read.wait(10)
            rows = scratch[: self.num_bytes].view(np.float32).reshape(self.weight.shape)
            rows[:] = self.weight
            if self.name == others[-1]:
                later_is_read.set()
            return rows

    for bad, key in ((1.0, first), (2.0, others[0])):
        weights[key][0, :2] = np.nan, bad
    layout = layout_of("phi3", "float32", "int8")
    parts = [InScratch(k, w, num_bytes=w.nbytes) for k, w in weights.items()]
    with pytest.raises(NotFinite) as caught:
        load_packed(layout, lambda: parts, pool(2), None, "")
    name, _, rows = caught.value.rows
    assert (name, rows[0, 1]) == (first, 1.0)


@pytest.mark.parametrize("damage", ["changed", "cut"])
def test_a_damaged_file_is_told_once_and_written_anew(tmp_path: Path, damage: str) -> None:
    program, weights = loaded("gemma2", "bfloat16")
    layout, packed_cache = layout_of("gemma2", "bfloat16", "int8"), PackedCache(tmp_path)

    def load() -> tuple[PackedWeights, list[str]]:
        return load_packed(layout, lambda: whole(weights), pool(2), packed_cache, "k")

    want = logits(program, load()[0])
    content = bytearray(packed_cache.file("k").read_bytes())
    content[-500] ^= 16
    packed_cache.file("k").write_bytes(content if damage == "changed" else content[:-1])
    packed, notes = load()
    np.testing.assert_array_equal(logits(program, packed), want)
    (note,) = notes
    assert "is damaged" in note and "packed again" in note and str(tmp_path) in note
    assert load()[1] == []


def test_without_a_place_for_the_cache_it_goes_on_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    program, weights = loaded("gemma2", "bfloat16")
    layout = layout_of("gemma2", "bfloat16", "int8")
    packed, notes = load_packed(
        layout, lambda: whole(weights), pool(2), PackedCache(tmp_path / "file"), "k"
    )
    (note,) = notes
    assert "the next start packs them again" in note
    assert np.isfinite(logits(program, packed)).all()


def test_the_key_names_all_that_the_bytes_depend_on() -> None:
    keys = [
        layout_of("gemma2", "bfloat16", "int8").key(pool(1), "fingerprint", "bfloat16"),
        layout_of("gemma2", "bfloat16", "int8").key(pool(1), "another", "bfloat16"),
        layout_of("gemma2", "float32", "int8").key(pool(1), "fingerprint", "float32"),
        layout_of("gemma2", "bfloat16", "int4").key(pool(1), "fingerprint", "bfloat16"),
        layout_of("gemma2", "bfloat16").key(pool(1), "fingerprint", "bfloat16"),
        layout_of("phi3", "bfloat16", "int8").key(pool(1), "fingerprint", "bfloat16"),
    ]
    assert len(set(keys)) == len(keys)
    assert (
        layout_of("gemma2", "bfloat16", "int8").key(pool(1), "fingerprint", "bfloat16") == keys[0]
    )


def test_the_key_sees_another_way_of_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, pack = layout_of("gemma2", "bfloat16", "int4"), native.pack
    before = layout.key(pool(1), "fingerprint")

    def pack_otherwise(kind: str, group: int, sources: Any, data: Any, *rest: Any) -> Any:
        result = pack(kind, group, sources, data, *rest)
        if kind == "int4":
            data[-1] ^= 1
        return result

    monkeypatch.setattr(native, "pack", pack_otherwise)
    assert layout.key(pool(1), "fingerprint") != before


def test_progress_is_in_bytes_of_the_arena(tmp_path: Path) -> None:
    _, weights = loaded("gemma2", "bfloat16")
    layout, packed_cache = layout_of("gemma2", "bfloat16", "int8"), PackedCache(tmp_path)
    calls: list[tuple[int, int]] = []

    def note(*call: int) -> None:
        calls.append(call)  # type: ignore[arg-type]

    load_packed(layout, lambda: whole(weights), pool(2), packed_cache, "k", note)
    assert len(calls) == len(weights)
    assert calls == sorted(calls)
    assert calls[-1] == (layout.num_bytes,) * 2
    load_packed(layout, lambda: whole(weights), pool(2), packed_cache, "k", note)
    assert calls[-1] == (layout.num_bytes,) * 2
