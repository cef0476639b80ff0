"""What people name as a model, and is none that Duetto reads: said in one line, with what would do.

Looks at names and at a file's first bytes; asks no network.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from duetto.checkpoints.config import MODEL_TYPES
from duetto.checkpoints.shapes import SHAPES
from duetto.core.near import near_misses

CHECKPOINT = "a directory with config.json, tokenizer.json and *.safetensors, or org/name"
_GGUF = f"not supported yet; name the safetensors checkpoint: {CHECKPOINT}"
_BY_SUFFIX = {
    ".gguf": f"is a GGUF file, which is {_GGUF}",
    ".ggml": f"is a GGML file, which is {_GGUF}",
    ".safetensors": "is one file of weights; name the directory that it is in, beside config.json "
    "and tokenizer.json",
    **dict.fromkeys(
        (".bin", ".pt", ".pth", ".ckpt", ".pkl"),
        "is a pickle of PyTorch's, which may run code and is never loaded; convert it to "
        "safetensors",
    ),
    **dict.fromkeys(
        (".onnx", ".tflite", ".mlmodel", ".mlpackage", ".h5", ".msgpack", ".engine", ".nemo"),
        f"is another engine's format, which is not supported; name {CHECKPOINT}",
    ),
    **dict.fromkeys(
        (".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z"),
        "is an archive; unpack it and name the directory",
    ),
}
_QUANTIZED_TAG = re.compile(r"(?i)(ud-)?(i?q[0-9]\w*|f16|bf16|f32|mxfp4\w*)(\.gguf)?")
_HUB_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
# Bare names on the hub are those of its first models: none of these architectures is supported.
_OLD_NAMES = re.compile(
    r"(?i)(distil)?(gpt2|openai-gpt|gpt-?neox?|gpt-j|bert|roberta|xlm|xlnet|albert|electra|t5|ctrl|"
    r"bart|opt|bloom|falcon|mamba|rwkv|phi-?2|deberta|camembert)([-_.].*)?"
)


def other_format(model: str | Path) -> str | None:
    """What `model` plainly is, if it is no checkpoint of ours; None where nothing is known of it.

    Meant for what is neither a directory nor a name that the caller knows.
    """
    name = str(model)
    if (found := _HUB_ADDRESS.match(name)) is not None:
        return f"is an address; name the model itself: {found[1]}"
    if re.match(r"\w+://", name):
        return f"is an address, and nothing is loaded from there; name {CHECKPOINT}"
    path = Path(name)
    if (why := _BY_SUFFIX.get(path.suffix.lower())) is not None:
        return why
    if path.is_file():
        return _by_first_bytes(path)
    base, _, tag = name.rpartition(":")
    if base and not path.exists():
        return _tagged(base, tag)
    if "/" in name:
        return (
            f"is a repository of GGUF files, which are {_GGUF}"
            if _is_gguf_repository(name)
            else None
        )
    if name.lower() not in SHAPES and _OLD_NAMES.fullmatch(name):
        return (
            f"is a model whose architecture is not supported; supported model types: "
            f"{', '.join(MODEL_TYPES)}"
        )
    return None


def directory_of_others(directory: Path) -> str | None:
    """What a directory without a config.json plainly holds instead of a checkpoint."""
    if (directory / "config.json").exists():
        return None
    if any(directory.glob("*.gguf")):
        return f"holds no config.json, but GGUF files, which are {_GGUF}"
    inner = sorted(path.parent.name for path in directory.glob("*/config.json"))
    if len(inner) == 1:
        return f"has no config.json, but {directory / inner[0]} has: name that"
    return None


def neither_here_nor_there(model: str | Path, known: Iterable[str] = ()) -> str:
    """Of a name about which other_format knows nothing, and which is no org/name of the hub.

    `known`: names that would have done; one that is near is suggested.
    """
    name = str(model)
    if (shape := name.lower()) in SHAPES:
        return f"is a shape without weights; `duetto make-model {shape} DIR` makes a random model"
    if Path(name).exists():
        return f"is not a directory with a checkpoint; name {CHECKPOINT}"
    return (
        f"is not a directory with a checkpoint{near_misses(name, known)}; name one ({CHECKPOINT}), "
        "or duetto-demo, which ships with Duetto"
    )


def _by_first_bytes(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return None
    if start == b"GGUF":
        return _BY_SUFFIX[".gguf"]
    if start[:2] == b"PK":
        return _BY_SUFFIX[".pt"]
    return None


def _tagged(base: str, tag: str) -> str | None:
    """A name with a colon, as llama.cpp's and Ollama's have it."""
    if _QUANTIZED_TAG.fullmatch(tag):
        bits = "int8" if "8" in tag else "int4"
        near = f"{base} with --quantization {bits}" if "/" in base else CHECKPOINT
        if _is_gguf_repository(base):
            near = f"the model that it was made from, with --quantization {bits}"
        return f"names a GGUF quantization, which is not supported yet; nearest: {near}"
    if "/" not in base:
        return f"is a name of Ollama's, whose models are GGUF files, which are {_GGUF}"
    return f"has a tag ({tag}), which models on the hub have not; is it {base}?"


def _is_gguf_repository(name: str) -> bool:
    return re.search(r"(?i)[-_.]gguf$", name) is not None
