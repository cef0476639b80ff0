"""Writes a complete checkpoint directory with random weights, for any supported config.

It has a tokenizer trained on text that every Python has (its own standard library) and a chat
template, so everything around the weights behaves as with a real model: what it says is noise.
Nothing is held in memory beyond a few million numbers. The same config, seed, dtype and Python
give the same bytes.
"""

import json
import struct
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from duetto.checkpoints.checkpoint import STORED_AS
from duetto.checkpoints.config import parse_config
from duetto.checkpoints.json_file import JsonSection
from duetto.checkpoints.weight_files import INDEX, SINGLE
from duetto.core.errors import ConfigError
from duetto.models.programs import build_program
from duetto.program.dtype import DTYPE_BYTES, DTYPES, Dtype
from duetto.program.program import Program

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256  # every byte has a token
_MAX_TOKENS = 2000  # that are trained; rows of the embedding beyond them stay without a token
_TRAINING_CHARACTERS = 1_000_000
_NUMBERS_AT_ONCE = 1 << 22
_SHARD_BYTES = 5 * 10**9
_UNFINISHED = "config.json.part"  # what config.json is called until all the rest is written

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True, slots=True)
class MadeModel:
    """What was written."""

    num_parameters: int
    num_tokens: int  # of the tokenizer; the model's vocabulary may be larger
    file_bytes: Mapping[str, int]  # by name, in the order written


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    constant: float | None  # None: drawn at random


def make_model(
    config: Mapping[str, Any],
    out: Path,
    *,
    source: Path = Path("config.json"),
    dtype: Dtype = "bfloat16",
    seed: int = 0,
    vocab_size: int | None = None,
    force: bool = False,
    max_shard_bytes: int = _SHARD_BYTES,
    repeats: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> MadeModel:
    """Write a checkpoint of the shape that `config`, a config.json, says, into directory `out`.

    Matrices and biases are normal with the config's initializer_range (0.02 if it has none) as
    standard deviation; norms multiply by 1. `source` names the config in messages. `force`
    replaces a checkpoint that is in `out`. `repeats` draws a few million numbers only, again and
    again: as fast as files are written, for who measures. `on_progress(done, total)` is called in
    bytes.

    Raises CheckpointError for a config that is not supported, and ConfigError if `out` is in use
    or the vocabulary has no room for a byte-level tokenizer.
    """
    section, program = _resolve(config, source, dtype, vocab_size)
    std = section.positive("initializer_range", 0.02)
    _claim(out, section.values, force)
    tokenizer = train_tokenizer(min(program.vocab_size, _MAX_TOKENS))
    try:
        numbers = _Repeated(dtype, seed, std) if repeats else partial(_numbers, seed=seed, std=std)
        _write_weights(program, out, dtype, numbers, max_shard_bytes, on_progress)
        _write_tokenizer(tokenizer, out, program.max_model_len)
        generation = {"bos_token_id": 0, "eos_token_id": [2, 0], "do_sample": True}
        _write_json(out / "generation_config.json", generation)
        # Last: a directory without it is no checkpoint, so what is half written is never loaded.
        (out / _UNFINISHED).replace(out / "config.json")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error}") from error
    files = {file.name: file.stat().st_size for file in sorted(out.iterdir()) if file.is_file()}
    return MadeModel(program.num_parameters, tokenizer.get_vocab_size(), files)


def _resolve(
    config: Mapping[str, Any], source: Path, dtype: Dtype, vocab_size: int | None
) -> tuple[JsonSection, Program]:
    """The config.json as it will be written, and its program."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    # The published ids belong to the published tokenizers, not to ours.
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    values = {**config, **ids, "torch_dtype": dtype}
    values.pop("dtype", None)
    if vocab_size is not None:
        values["vocab_size"] = vocab_size
    section = JsonSection(source, values)
    program = build_program(parse_config(section))
    if program.vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"{source}: vocab_size: {program.vocab_size} has no room for a byte-level tokenizer; "
            f"at least {MIN_VOCAB_SIZE} is needed"
        )
    return section, program


def train_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of at most this many tokens, trained on the standard library."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(), trainer)
    return tokenizer


def _training_texts() -> Iterator[str]:
    """Text that the machine has, the same each time: the first files of the standard library."""
    left = _TRAINING_CHARACTERS
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")[:left]
        left -= len(text)
        yield text
        if left <= 0:
            return


def write_weights(
    program: Program,
    out: Path,
    dtype: Dtype,
    seed: int,
    std: float,
    max_shard_bytes: int = _SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write random weights of a program as one safetensors file, or as shards with an index.

    A tensor's numbers depend on the seed and its name only, not on the shards.
    """
    numbers = partial(_numbers, seed=seed, std=std)
    _write_weights(program, out, dtype, numbers, max_shard_bytes, on_progress)


def _write_weights(
    program: Program,
    out: Path,
    dtype: Dtype,
    numbers: "Callable[[_Tensor], Iterator[NDArray[Any]]]",
    max_shard_bytes: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    item_bytes = DTYPE_BYTES[dtype]
    tensors = _tensors(program)
    sizes = {tensor.name: prod(tensor.shape) * item_bytes for tensor in tensors}
    shards: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        used = sum(sizes[other.name] for other in shards[-1])
        if shards[-1] and used + sizes[tensor.name] > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    total, done = sum(sizes.values()), 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if on_progress is not None:
            on_progress(done, total)

    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{index:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor.name: name for tensor in shard}
        with (out / name).open("wb") as file:
            _write_shard(file, shard, dtype, numbers, advance)
    if len(shards) > 1:
        _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensors(program: Program) -> list[_Tensor]:
    """The checkpoint's tensors: what the program stacks, apart, each once."""
    numbers = {name: number for op in program.ops for name, number in op.initial.items()}
    found: dict[str, _Tensor] = {}
    for name, spec in program.weights.items():
        for source, rows in zip(spec.sources, spec.source_rows, strict=True):
            found[source] = _Tensor(source, (rows, *spec.shape[1:]), numbers.get(name))
    return list(found.values())


def _write_shard(
    file: BinaryIO,
    tensors: list[_Tensor],
    dtype: Dtype,
    numbers: Callable[[_Tensor], Iterator[NDArray[Any]]],
    advance: Callable[[int], None],
) -> None:
    """The safetensors format: length of the header (u64), header (JSON), then the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, item_bytes = 0, DTYPE_BYTES[dtype]
    for tensor in tensors:
        end = offset + prod(tensor.shape) * item_bytes
        header[tensor.name] = {
            "dtype": STORED_AS[dtype],
            "shape": tensor.shape,
            "data_offsets": (offset, end),
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors:
        for part in numbers(tensor):
            file.write(part.astype(dtype, copy=False).tobytes())
            advance(part.size * item_bytes)


def _numbers(tensor: _Tensor, seed: int, std: float) -> Iterator[NDArray[np.float32]]:
    """A tensor's numbers in order, a part at a time."""
    stream = np.random.Generator(np.random.PCG64([seed, *tensor.name.encode()]))
    left = prod(tensor.shape)
    while left:
        size = min(left, _NUMBERS_AT_ONCE)
        if tensor.constant is None:
            yield stream.standard_normal(size, np.float32) * np.float32(std)
        else:
            yield np.full(size, tensor.constant, np.float32)
        left -= size


class _Repeated:
    """As `_numbers`, but all matrices are made of the same few million."""

    def __init__(self, dtype: Dtype, seed: int, std: float) -> None:
        stream = np.random.Generator(np.random.PCG64(seed))
        drawn = stream.standard_normal(_NUMBERS_AT_ONCE, np.float32) * np.float32(std)
        self._drawn: NDArray[Any] = drawn.astype(dtype)

    def __call__(self, tensor: _Tensor) -> Iterator[NDArray[Any]]:
        left = prod(tensor.shape)
        while left:
            size = min(left, _NUMBERS_AT_ONCE)
            if tensor.constant is None:
                yield self._drawn[:size]
            else:
                yield np.full(size, tensor.constant, np.float32)
            left -= size


def _write_tokenizer(tokenizer: tokenizers.Tokenizer, out: Path, max_length: int) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    end, _, end_of_message = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end_of_message,
        "pad_token": end,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(out / "tokenizer_config.json", config)


def _claim(out: Path, config: Mapping[str, Any], force: bool) -> None:
    """Make the directory, empty of what we write but for the config that marks it as unfinished."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; a directory is to be written")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise ConfigError(f"{out}: is not empty; --force replaces the model in it")
        if not any((out / name).is_file() for name in ("config.json", _UNFINISHED)):
            raise ConfigError(f"{out}: holds no model that --force could replace")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_json(out / _UNFINISHED, config)
        for stale in (out / "config.json", out / INDEX, *out.glob("model*.safetensors")):
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error}") from error


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
