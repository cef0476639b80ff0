"""Writes a trained model as a Hugging Face checkpoint in bf16."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from training.llama import Llama
from training.shapes import MAX_LENGTH
from training.tokenizer import END, END_OF_TEXT, write_tokenizer


def export(model: Llama, tokenizer: Tokenizer, out: Path) -> int:
    """Write the checkpoint into `out`; return its size in bytes."""
    write_tokenizer(tokenizer, out, MAX_LENGTH)
    tensors = {name: t.to("cpu", torch.bfloat16) for name, t in model.state_dict().items()}
    weights = out / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # it is written for its owner only, and would be so in a wheel
    text_end, end = tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id(END)
    generation = {"bos_token_id": text_end, "eos_token_id": [end, text_end], "do_sample": False}
    _write_json(out / "generation_config.json", generation)
    _write_json(out / "config.json", model.shape.config_json(bos=text_end, eos=end, pad=text_end))
    return sum(file.stat().st_size for file in out.iterdir() if file.is_file())


def _write_json(file: Path, values: dict[str, object]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
