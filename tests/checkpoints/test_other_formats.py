"""What people name as a model, and is none: told in one line, with what would do."""

from pathlib import Path

import pytest

from duetto.build import find_checkpoint
from duetto.checkpoints.shapes import SHAPES
from duetto.cli.make_model import make_model
from duetto.core.errors import CheckpointError, ConfigError
from duetto.demo import READER, demo_model_dir
from duetto.models.find import LARGE_SHAPES, find_config


def refusal(model: str) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        find_checkpoint(model)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 250
    return message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.gguf", "is a GGUF file, which is not supported yet"),
        ("org/model-Q4_K_M.gguf", "is a GGUF file"),
        ("/models/x.GGUF", "is a GGUF file"),
        ("org/name:Q4_K_M", "nearest: org/name with --quantization int4"),
        ("org/name:Q8_0", "nearest: org/name with --quantization int8"),
        ("org/name:IQ2_XXS", "nearest: org/name with --quantization int4"),
        ("org/name-GGUF:UD-Q4_K_XL", "the model that it was made from"),
        ("org/name-GGUF", "repository of GGUF files"),
        ("llama3:8b", "name of Ollama's"),
        ("qwen3:latest", "name of Ollama's"),
        ("org/name:main", "is it org/name?"),
        ("gpt2", "not supported; supported model types: llama"),
        ("gpt2-medium", "architecture is not supported"),
        ("bert-base-uncased", "architecture is not supported"),
        ("model.safetensors", "name the directory that it is in"),
        ("pytorch_model.bin", "is a pickle"),
        ("model.onnx", "another engine's format"),
        ("model.tar.gz", "is an archive"),
        ("https://huggingface.co/org/name/tree/main", "name the model itself: org/name"),
        ("hf.co/org/name", "name the model itself: org/name"),
        ("s3://bucket/model", "nothing is loaded from there"),
        ("llama-3.2-1b", "duetto make-model llama-3.2-1b DIR"),
        ("nothing", "duetto-demo, which ships with Duetto"),
        ("Llama-3.2-1B", "duetto make-model llama-3.2-1b DIR"),
        ("duetto-dmo", "did you mean duetto-demo or duetto-demo-draft?"),
        ("Duetto_Demo", "did you mean duetto-demo"),
        ("./no/such/place", "is not a directory with a checkpoint"),
    ],
)
def test_a_name_is_told_as_what_it_is(name: str, words: str) -> None:
    assert refusal(name).startswith((f"{name}: ", f"{Path(name)}: "))
    assert words in refusal(name)


def test_a_file_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"GGUF\3\0\0\0")
    assert "is a GGUF file" in refusal(str(file))
    file.write_bytes(b"PK\3\4")
    assert "is a pickle" in refusal(str(file))
    file.write_bytes(b"hello")
    assert "is not a directory with a checkpoint; name a directory" in refusal(str(file))


def test_a_directory_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert "but GGUF files" in refusal(str(tmp_path))
    with pytest.raises(ConfigError, match="but GGUF files"):
        find_config(str(tmp_path))
    other = tmp_path / "outer"
    (other / "model").mkdir(parents=True)
    (other / "model" / "config.json").touch()
    assert f"but {other / 'model'} has: name that" in refusal(str(other))


@pytest.mark.parametrize("name", ["model.gguf", "org/name:Q4_K_M", "gpt2", "hf.co/org/name"])
def test_where_no_weights_are_read_it_is_told_too(name: str, tmp_path: Path) -> None:
    for refuse in (lambda: find_config(name), lambda: make_model(name, tmp_path / "out")):
        with pytest.raises(ConfigError) as caught:
            refuse()
        assert str(caught.value) == refusal(name)


def test_a_shape_to_make_is_found_in_any_case_and_near_ones_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean llama-3\.2-1b\?"):
        make_model("llama-3.2-2b", tmp_path / "out")
    make_model("TINY", tmp_path / "tiny", vocab_size=300)
    assert find_config(str(tmp_path / "tiny")).vocab_size == 300
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ConfigError, match="but GGUF files"):
        make_model(str(tmp_path), tmp_path / "out")


def test_an_empty_name_is_not_this_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for refuse in (find_checkpoint, find_config, lambda name: make_model(name, tmp_path / "out")):
        with pytest.raises(ConfigError, match=r"^an empty name: is n"):
            refuse("")


@pytest.mark.parametrize("name", [*SHAPES, *LARGE_SHAPES])
def test_a_named_shape_has_16_bits_as_it_was_published(name: str) -> None:
    assert find_config(name).dtype in ("bfloat16", "float16")


def test_a_gguf_file_where_a_config_is_expected(tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(ConfigError, match="is a GGUF file"):
        find_config(str(file))


def test_the_models_that_ship_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_checkpoint(READER) == demo_model_dir()
    assert find_config(READER).vocab_size == find_config(str(demo_model_dir())).vocab_size
    monkeypatch.chdir(tmp_path)
    (tmp_path / READER).mkdir()
    assert find_checkpoint(READER) == Path(READER)  # a directory here is nearer
