"""Which weight is kept in which format."""

import json
from pathlib import Path

import pytest

from duetto.backends.cpu.formats import CODED, Format, choose_formats, without_loss
from duetto.checkpoints.shapes import SHAPES
from duetto.core.errors import ConfigError
from duetto.models.programs import load_program
from duetto.program.program import Program

F32, BF16, INT8, INT4 = Format("f32"), Format("bf16"), Format("int8", 128), Format("int4", 64)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QKV = "model.layers.0.self_attn.q_proj.weight"


def program(directory: Path, **changes: object) -> Program:
    config = dict(SHAPES["tiny"]) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return load_program(directory)[1]


@pytest.mark.parametrize(
    ("dtype", "stored"), [("bfloat16", BF16), ("float32", F32), ("float16", F32)]
)
def test_without_quantization_every_matrix_is_as_the_dtype_says(
    tmp_path: Path, dtype: str, stored: Format
) -> None:
    made = program(tmp_path)
    formats = choose_formats(made, dtype)
    assert set(formats.values()) == {stored}
    assert set(formats) == {name for name, spec in made.weights.items() if len(spec.shape) == 2}


def test_only_bf16_is_kept_in_12_bits(tmp_path: Path) -> None:
    made = program(tmp_path, tie_word_embeddings=False)
    coded = without_loss(choose_formats(made, "bfloat16"), plain=(HEAD,))
    assert coded.pop(HEAD) == BF16
    assert set(coded.values()) == {CODED}
    mixed = without_loss(choose_formats(made, "bfloat16", "int8"))
    assert (mixed[EMBEDDING], mixed[HEAD]) == (CODED, INT8)
    assert set(without_loss(choose_formats(made, "float32")).values()) == {F32}


@pytest.mark.parametrize(
    ("quantization", "layers", "head"), [("int8", INT8, INT8), ("int4", INT4, INT8)]
)
def test_tied_embeddings_are_quantized_as_the_head_that_they_are(
    tmp_path: Path, quantization: str, layers: Format, head: Format
) -> None:
    formats = choose_formats(program(tmp_path), "bfloat16", quantization)
    assert formats.pop(EMBEDDING) == head
    assert set(formats.values()) == {layers}


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_embeddings_that_are_only_looked_up_stay_whole(tmp_path: Path, quantization: str) -> None:
    formats = choose_formats(program(tmp_path, tie_word_embeddings=False), "bfloat16", quantization)
    assert formats[EMBEDDING] == BF16
    assert formats[HEAD] == INT8


@pytest.mark.parametrize(
    "pattern",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj",  # the module
        "model.layers.0.self_attn.v_proj",  # stacked under q_proj's name
        "*.0.self_attn.[qk]_proj*",
    ],
)
def test_a_pattern_keeps_what_it_matches_and_what_is_stacked_with_it(
    tmp_path: Path, pattern: str
) -> None:
    formats = choose_formats(program(tmp_path), "bfloat16", "int4", [pattern])
    assert [name for name, chosen in formats.items() if chosen == BF16] == [QKV]


def test_several_patterns(tmp_path: Path) -> None:
    skip = ["model.layers.1.*", "*down_proj*", EMBEDDING]
    formats = choose_formats(program(tmp_path), "float32", "int8", skip)
    assert formats[EMBEDDING] == F32
    for name, chosen in formats.items():
        if name != EMBEDDING:
            assert (chosen == F32) == ("layers.1." in name or "down_proj" in name)


@pytest.mark.parametrize(
    "pattern", ["model.layers.2.*", "", "self_attn", "MODEL.*", "*.bias", "*layernorm*"]
)
def test_a_pattern_that_matches_nothing_is_an_error(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"--quantization-skip: .*matches no tensor") as caught:
        choose_formats(program(tmp_path), "bfloat16", "int8", ["model.layers.1.*", pattern])
    assert repr(pattern) in str(caught.value)
