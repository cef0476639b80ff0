"""Whether a checkpoint is made for embeddings, and how: sentence-transformers' files beside it.

modules.json names the modules that follow the model, each with a config.json of its own. What is
computed is the last token's hidden state at length 1; anything else is refused by its name.
"""

import json
import re
from pathlib import Path

from duetto.checkpoints.checkpoint_file import is_there, read_text_part
from duetto.checkpoints.config import ModelConfig
from duetto.checkpoints.json_file import JsonSection, read_json
from duetto.core.embeddings import EmbeddingModel, Runner
from duetto.core.errors import CheckpointError, ConfigError

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
POOLING = "1_Pooling/config.json"  # where modules.json says it, nearly always
_COMPUTED = ("Transformer", "Pooling", "Normalize")
_MODE = "pooling_mode_"
_LAST = "lasttoken"
_FOLDER = re.compile(r"[\w-]*")


def find_embedding_model(
    model_dir: Path, runner: Runner, config: ModelConfig, *, matryoshka: bool = False
) -> tuple[EmbeddingModel | None, tuple[str, ...]]:
    """What the model gives that is to be run as `runner` says, and notes for people; None if it is
    to generate.

    `matryoshka`: embeddings may be cut, whatever config.json says. Raises CheckpointError, naming
    the file and the key, for a pooling that is not the last token's, and for modules that are not
    computed here.
    """
    is_made = is_there(model_dir / MODULES)
    if runner == "generate" or not (is_made or runner == "pooling"):
        if matryoshka:
            raise ConfigError("--matryoshka: the model is run to generate; see --runner pooling")
        return None, ()
    notes: list[str] = []
    if is_made:
        notes += _check_modules(model_dir)
    else:
        notes.append(
            f"no {MODULES} says that the model is made for embeddings: they are the last token's "
            f"hidden state, at length 1"
        )
    section = read_json(model_dir / "config.json")
    _refuse_other_attention(section)
    prompts, default = _prompts(model_dir)
    if default is not None:
        notes.append(
            f"{PROMPTS}: the prompt {default!r} is put before each text that names no other"
        )
    sizes = None if matryoshka else _sizes(section, config.hidden_size)
    embedding = EmbeddingModel(
        size=config.hidden_size, sizes=sizes, prompts=prompts, default_prompt=default
    )
    return embedding, tuple(notes)


def _check_modules(model_dir: Path) -> list[str]:
    """Refuse what is not computed here; notes on what is computed though nothing asks for it."""
    file = model_dir / MODULES
    modules = _read_modules(file)
    kinds = [kind for kind, _ in modules]
    if strange := next((kind for kind in kinds if kind not in _COMPUTED), None):
        raise CheckpointError(
            file, f"the module {strange} is not computed here; accepted: {', '.join(_COMPUTED)}"
        )
    if kinds[:2] != ["Transformer", "Pooling"] or len(set(kinds)) < len(kinds):
        raise CheckpointError(
            file, f"has the modules {', '.join(kinds)}; accepted: {', '.join(_COMPUTED)}"
        )
    _check_pooling(model_dir / modules[1][1] / "config.json")
    if "Normalize" in kinds:
        return []
    return [f"{MODULES} has no Normalize: embeddings are brought to length 1 all the same"]


def _read_modules(file: Path) -> list[tuple[str, str]]:
    """The kind of each module, and its folder."""
    try:
        entries = json.loads(read_text_part(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(file, f"is not valid JSON: {error}") from None
    found: list[tuple[str, str]] = []
    for entry in entries if isinstance(entries, list) else [None]:
        module = entry if isinstance(entry, dict) else {}
        kind, path = module.get("type"), module.get("path")
        # A checkpoint is untrusted input: a folder beside it only.
        is_path = isinstance(path, str) and _FOLDER.fullmatch(path) is not None
        if not isinstance(kind, str) or not isinstance(path, str) or not is_path:
            raise CheckpointError(file, "must list modules, each with its type and its folder")
        found.append((kind.rpartition(".")[2], path))
    return found


def _check_pooling(file: Path) -> None:
    section = read_json(file)
    named = section.get("pooling_mode")
    modes = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    modes += [
        key.removeprefix(_MODE)
        for key, value in section.values.items()
        if key.startswith(_MODE) and value is True
    ]
    if modes != [_LAST]:
        has = ", ".join(map(str, modes)) or "none"
        raise CheckpointError(
            file, f"pooling: {has:.80} is not computed here; accepted: {_LAST}, the last token's"
        )


def _refuse_other_attention(section: JsonSection) -> None:
    """Decoders that were trained to see both ways say so under keys of their own."""
    if section.get("is_causal") is False:
        section.refuse("is_causal", "false: attention both ways is not computed here")


def _sizes(section: JsonSection, size: int) -> tuple[int, ...] | None:
    """Keys as vLLM reads them; sentence-transformers has none."""
    given = section.get("matryoshka_dimensions")
    if given is None:
        return None if section.flag("is_matryoshka", default=False) else ()
    is_list = isinstance(given, list) and all(type(each) is int for each in given)
    if not is_list or not all(1 <= each <= size for each in given):
        section.refuse("matryoshka_dimensions", f"must list whole numbers from 1 to {size}")
    return tuple(sorted(set(given)))


def _prompts(model_dir: Path) -> tuple[dict[str, str], str | None]:
    file = model_dir / PROMPTS
    if not is_there(file):
        return {}, None
    config = read_json(file)
    section = config.section("prompts")
    prompts: dict[str, str] = {}
    for name, text in ({} if section is None else section.values).items():
        if not isinstance(text, str):
            config.refuse(f"prompts.{name}", "must be a text")
        prompts[name] = text
    default = config.get("default_prompt_name")
    if default is not None and default not in prompts:
        config.refuse("default_prompt_name", f"{default!r:.80} is not one of the prompts")
    return prompts, default
