"""config.json in both dialects, what an absent key means, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from duetto.checkpoints.config import (
    MODEL_TYPES,
    GenerationDefaults,
    ModelConfig,
    parse_config,
    read_config,
    read_generation_config,
)
from duetto.checkpoints.json_file import JsonSection
from duetto.checkpoints.rope import LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling
from duetto.core.errors import CheckpointError, ConfigError
from duetto.models.programs import PROGRAMS, build_program, load_program

SHAPE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def parse(model_type: str = "llama", **keys: Any) -> ModelConfig:
    return parse_config(JsonSection(Path("config.json"), SHAPE | {"model_type": model_type} | keys))


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def test_every_model_type_has_its_program() -> None:
    assert set(PROGRAMS) == set(MODEL_TYPES)
    for model_type, program in PROGRAMS.items():
        assert program.__module__ == f"duetto.models.{model_type}"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        (
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        ),
        (
            {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
        ),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"rope_scaling": None}, {}),
        ({"head_dim": None}, {"head_dim": 16}),
    ],
)
def test_both_dialects_of_llama_say_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert parse(**old) == parse(**new)


def test_both_dialects_of_gemma_3_say_the_same() -> None:
    old = parse(
        "gemma3_text",
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
    )
    new = parse(
        "gemma3_text",
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert old == new
    sliding, full = old.layers[:2]
    assert (sliding.window, full.window) == (4096, None)
    assert (sliding.rope.theta, sliding.rope.scaling) == (1e4, None)
    assert (full.rope.theta, full.rope.scaling) == (1e6, LinearScaling(8.0))
    assert old.context_length == 512  # Gemma 3's scaling is already in it


def test_what_an_absent_key_means() -> None:
    llama = parse()
    assert (llama.head_dim, llama.attention_scale) == (16, 0.25)
    assert (llama.rms_norm_eps, llama.activation) == (1e-6, "silu")
    assert not (llama.attention_bias or llama.mlp_bias or llama.tie_word_embeddings)
    assert (llama.dtype, llama.eos_token_ids, llama.bos_token_id) == (None, (), None)
    assert windows(llama) == [None] * 4
    assert llama.layers[0].rope.theta == 10_000
    assert parse(num_key_value_heads=None).num_kv_heads == 4
    gemma = parse("gemma2")
    assert (gemma.attention_softcap, gemma.final_softcap) == (50, 30)
    assert (gemma.head_dim, gemma.attention_scale) == (256, 1 / 16)
    assert gemma.tie_word_embeddings
    assert gemma.activation == "gelu_tanh"
    assert windows(gemma) == [4096, None, 4096, None]
    assert parse("gemma2", final_logit_softcapping=None).final_softcap is None
    assert windows(parse("gemma3_text", num_hidden_layers=7)) == [*[4096] * 5, None, 4096]


@pytest.mark.parametrize(
    ("model_type", "keys", "wanted"),
    [
        ("mistral", {}, [4096] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("phi3", {}, [None] * 4),
        ("phi3", {"sliding_window": 48}, [48] * 4),
        ("qwen2", {"sliding_window": 48, "max_window_layers": 2}, [None] * 4),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 3},
            [None, None, None, 48],
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 48,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            [48, None, 48, None],
        ),
    ],
)
def test_windows(model_type: str, keys: dict[str, Any], wanted: list[int | None]) -> None:
    assert windows(parse(model_type, **keys)) == wanted


def test_scaled_ropes() -> None:
    llama3 = parse(rope_scaling={"rope_type": "llama3", **LLAMA3})
    assert llama3.layers[0].rope.scaling == Llama3Scaling(8.0, 1.0, 4.0, 64)
    assert llama3.context_length == 512
    yarn = parse(rope_scaling=YARN)
    scaling = yarn.layers[0].rope.scaling
    assert isinstance(scaling, YarnScaling)
    assert scaling.attention_factor == pytest.approx(1.1386294)
    assert yarn.context_length == 2048
    assert parse(rope_scaling={"type": "linear", "factor": 2.0}).context_length == 1024


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_phi_3_by_all_the_names_of_its_rope(name: str) -> None:
    config = parse(
        "phi3",
        max_position_embeddings=4096,
        original_max_position_embeddings=1024,
        rope_scaling={"type": name, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        partial_rotary_factor=0.5,
    )
    rope = config.layers[0].rope
    assert rope.rotary_dim == 8
    assert isinstance(rope.scaling, LongRopeScaling)
    assert rope.scaling.original_length == 1024
    assert rope.scaling.attention_factor == pytest.approx((1 + 2 / 10) ** 0.5)  # log 4 / log 1024


@pytest.mark.parametrize(("written", "ids"), [(2, (2,)), ([2, 3], (2, 3)), (None, ())])
def test_one_end_of_sequence_or_several(written: Any, ids: tuple[int, ...]) -> None:
    assert parse(eos_token_id=written).eos_token_ids == ids


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"model_type": "mamba"}, "model_type: 'mamba' is not supported", "llama, mistral, qwen2"),
    ({"model_type": None}, "model_type", "is missing"),
    ({"hidden_size": None}, "hidden_size", "is missing"),
    ({"vocab_size": "many"}, "vocab_size", "whole number"),
    ({"num_hidden_layers": True}, "num_hidden_layers", "whole number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers", "from 1 to"),
    ({"num_key_value_heads": 3}, "num_attention_heads", "not a multiple of num_key_value_heads, 3"),
    ({"hidden_size": 66}, "hidden_size", "not a multiple of num_attention_heads, 4"),
    ({"head_dim": 7}, "head_dim", "come in pairs"),
    ({"hidden_act": "relu"}, "hidden_act: 'relu' is not supported", "silu"),
    ({"rms_norm_eps": 0}, "rms_norm_eps", "above 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps", "above 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "true or false"),
    ({"dtype": "int8"}, "dtype: 'int8'", "bfloat16"),
    ({"torch_dtype": "float64"}, "torch_dtype: 'float64'", "bfloat16"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config", "not supported"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention", "not supported"),
    ({"sliding_window": 48}, "sliding_window", "for model_type llama"),
    ({"model_type": "mistral", "attention_bias": True}, "attention_bias", "model_type mistral"),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 9.0}, "attn_logit_softcapping", "not"),
    ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types", "4, entries"),
    (
        {"model_type": "gemma2", "layer_types": ["chunked_attention"] * 4},
        "layer_types: 'chunked_attention'",
        "full_attention, sliding_attention",
    ),
    (
        {
            "model_type": "qwen3",
            "use_sliding_window": False,
            "layer_types": ["sliding_attention"] * 4,
        },
        "layer_types",
        "use_sliding_window is false",
    ),
    ({"model_type": "gemma2", "sliding_window": None}, "sliding_window", "is missing"),
    ({"rope_theta": 1.0}, "rope_theta", "above 1"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type: 'dynamic'", "yarn"),
    ({"rope_parameters": {"rope_type": "ntk"}}, "rope_parameters.rope_type: 'ntk'", "llama3"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", "is missing"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor", "is missing"),
    (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
        "high_freq_factor",
        "more than low_freq_factor",
    ),
    ({"rope_scaling": "linear"}, "rope_scaling", "must be an object"),
    ({"rope_parameters": {"full_attention": {}}}, "full_attention", "gemma3_text only"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "accepted: 1"),
    (
        {
            "model_type": "phi3",
            "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]},
        },
        "rope_scaling.short_factor",
        "list of 8 numbers",
    ),
    ({"model_type": "phi3", "rope_scaling": {"type": "linear"}}, "rope_scaling.type", "longrope"),
    ({"model_type": "phi3", "rope_scaling": {"rope_type": []}}, "rope_scaling.rope_type", "[]"),
    ({"rope_scaling": {"rope_type": []}}, "rope_scaling.rope_type: []", "not supported"),
    ({"rope_scaling": {"rope_type": ""}}, "rope_scaling.rope_type: ''", "not supported"),
    ({"rope_scaling": {"type": "linear", "factor": 1e308}}, "rope_scaling.factor", "not 1e+308"),
    ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "rope_scaling.factor", "to 1e+30"),
    ({"rope_scaling": YARN | {"beta_fast": 1e308}}, "rope_scaling.beta_fast", "to 1e+30"),
    ({"rope_scaling": YARN | {"beta_slow": 5e-324}}, "rope_scaling.beta_slow", "not 5e-324"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps", "to 1e+30"),
    ({"rope_theta": 10**400}, "rope_theta", "to 1e+30"),
    ({"vocab_size": 10**400}, "vocab_size", "from 1 to 2147483647"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers", "from 1 to"),
    ({"head_dim": 2**30}, "head_dim", "from 1 to"),
    ({"hidden_size": 2**30}, "head_dim", "from 1 to"),
    (
        {"intermediate_size": 2**31 - 1},
        "intermediate_size",
        "2147483647 is more than any model has",
    ),
    (
        {"intermediate_size": 2**31 - 8},
        "intermediate_size",
        "2147483640 is more than any model has",
    ),
    ({"intermediate_size": 2**31}, "intermediate_size", "from 1 to 2147483647"),
    ({"vocab_size": 2**30}, "vocab_size", "1073741824 is more than any model has"),
    ({"hidden_size": 2**30, "head_dim": 64}, "hidden_size", "1073741824 is more than any"),
    (
        {"num_attention_heads": 2**31 - 4, "num_key_value_heads": 4, "head_dim": 64},
        "num_attention_heads",
        "137438953216 columns, with head_dim is more than any model has",
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 1e20}},
        "max_position_embeddings",
        "accepted: up to 2147483647",
    ),
    ({"max_position_embeddings": float("inf")}, "max_position_embeddings", "whole number"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id", "token id"),
]


@pytest.mark.parametrize(("keys", "key", "cause"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_not_supported_is_refused_by_name(
    keys: dict[str, Any], key: str, cause: str
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        parse_config(JsonSection(Path("m/config.json"), SHAPE | {"model_type": "llama"} | keys))
    message = str(refusal.value)
    assert message.startswith("m/config.json: ")
    assert key in message
    assert cause in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "cause"),
    [(None, "is missing"), ("{", "is not valid JSON"), ("[]", "JSON object"), (b"\xff", "read")],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: Any, cause: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=cause) as refusal:
        read_config(tmp_path)
    assert refusal.value.file == tmp_path / "config.json"


def written_numbers() -> list[tuple[str, str, str]]:
    """(text of config.json, the key at fault, the cause) of numbers that Python itself refuses."""
    many_digits = "9" * 5000
    return [
        (f'{{"{key}": {sign}{many_digits}}}', key, cause)
        for sign in ("", "-")
        for key, cause in (
            ("vocab_size", "whole number"),
            ("rms_norm_eps", "must be a number above 0 "),
            ("rope_theta", "must be a number above 0 "),
            ("eos_token_id", "token id"),
        )
    ]


@pytest.mark.parametrize(("text", "key", "cause"), written_numbers(), ids=lambda v: v[:20])
def test_numbers_of_thousands_of_digits(tmp_path: Path, text: str, key: str, cause: str) -> None:
    given = SHAPE | {"model_type": "llama"}
    given.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(given)[:-1] + ", " + text[1:])
    with pytest.raises(CheckpointError, match=f"config.json: {key}: .*{cause}") as refusal:
        read_config(tmp_path)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("depth", [*range(900, 1010), 100_000])
def test_what_is_nested_too_deep(tmp_path: Path, depth: int) -> None:
    config = json.dumps(SHAPE | {"model_type": "llama"})
    (tmp_path / "config.json").write_text(
        config[:-1] + ', "eos_token_id": ' + "[" * depth + "]" * depth + "}"
    )
    with pytest.raises(CheckpointError, match=r"config.json: (eos_token_id|is nested)") as refusal:
        read_config(tmp_path)
    assert len(str(refusal.value)) < 300


def generation(directory: Path, **written: Any) -> GenerationDefaults:
    (directory / "generation_config.json").write_text(json.dumps(written))
    return read_generation_config(directory)


def test_generation_config(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == GenerationDefaults()
    got = generation(
        tmp_path, eos_token_id=[1, 2], temperature=0.6, top_k=20, top_p=0.95, min_p=0, seed=3
    )
    assert got == GenerationDefaults(
        eos_token_ids=(1, 2), temperature=0.6, top_k=20, top_p=0.95, min_p=0
    )
    assert generation(tmp_path, top_k=-1).top_k == -1  # all
    assert generation(tmp_path, temperature=0).temperature == 0
    assert generation(tmp_path, top_p=None) == GenerationDefaults()


def test_no_sampling_is_greedy_whatever_else_is_said(tmp_path: Path) -> None:
    assert generation(tmp_path, do_sample=False, temperature=0.6, top_k=20).temperature == 0
    assert generation(tmp_path, do_sample=False).temperature == 0
    assert generation(tmp_path, do_sample=True, temperature=0.6).temperature == 0.6
    assert generation(tmp_path, do_sample=True).temperature is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("top_k", -3),
        ("top_k", 1.5),
        ("top_p", 1.5),
        ("top_p", 0),
        ("min_p", 2),
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", 10**299),
        ("repetition_penalty", 0),
        ("do_sample", "no"),
    ],
)
def test_a_generation_config_that_no_request_could_have(
    tmp_path: Path, key: str, value: Any
) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config.json: {key}: must be "):
        generation(tmp_path, **{key: value})


def test_the_context_is_what_the_config_allows_or_less(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"model_type": "llama"}))
    assert load_program(tmp_path)[1].max_model_len == 512
    assert load_program(tmp_path, 100)[1].max_model_len == 100
    for wrong in (0, 513):
        with pytest.raises(ConfigError, match=r"--max-model-len: must be from 1 to 512"):
            build_program(parse(), wrong)
