"""From a checkpoint directory to its Program: which file of this room knows which model_type.

Reads config.json only, never a weight, so that planning needs none.
"""

from collections.abc import Callable
from pathlib import Path

from duetto.checkpoints.config import ModelConfig, read_config
from duetto.core.errors import ConfigError
from duetto.models import gemma2, gemma3_text, llama, mistral, phi3, qwen2, qwen3
from duetto.program.program import Program

PROGRAMS: dict[str, Callable[[ModelConfig, int], Program]] = {
    "llama": llama.program,
    "mistral": mistral.program,
    "qwen2": qwen2.program,
    "qwen3": qwen3.program,
    "phi3": phi3.program,
    "gemma2": gemma2.program,
    "gemma3_text": gemma3_text.program,
}


def load_program(model_dir: Path, max_model_len: int | None = None) -> tuple[ModelConfig, Program]:
    """Read config.json and build the model's Program for requests of up to max_model_len tokens.

    None means the whole context that the config allows. Raises CheckpointError for a config that
    is not supported, and ConfigError for a max_model_len beyond it.
    """
    config = read_config(model_dir)
    return config, build_program(config, max_model_len)


def build_program(config: ModelConfig, max_model_len: int | None = None) -> Program:
    """As load_program, of a config that is already read."""
    if max_model_len is None:
        max_model_len = config.context_length
    if not 1 <= max_model_len <= config.context_length:
        raise ConfigError(
            f"--max-model-len: must be from 1 to {config.context_length}, which is all that the "
            f"model's config.json allows, not {max_model_len}"
        )
    return PROGRAMS[config.model_type](config, max_model_len)
