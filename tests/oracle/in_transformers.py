"""A case as transformers sees it: it writes the checkpoint and computes what is expected.

Imports torch; only the live comparison and make_fixtures.py import this.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from oracle.cases import NUM_GREEDY, Case, random_tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # threads cost more than these matrices


def write_checkpoint(case: Case, directory: Path) -> None:
    """Have transformers save a model with the case's weights."""
    config = AutoConfig.for_model(case.model_type, **case.full_config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied ones once
            parameter.copy_(torch.from_numpy(random_tensor(case, name, tuple(parameter.shape))))
    dtype = getattr(torch, case.dtype)
    num_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    shard_bytes = num_bytes // case.num_shards + 1
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_bytes)


class TransformersModel:
    def __init__(self, case: Case, directory: Path) -> None:
        config = AutoConfig.from_pretrained(directory)
        config.rope_parameters.update(case.oracle_rope)
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def logits(self, prompt: list[int]) -> NDArray[np.float32]:
        """[tokens, vocabulary]"""
        with torch.inference_mode():
            logits: NDArray[np.float32] = self._model(torch.tensor([prompt])).logits[0].numpy()
        return logits

    def greedy(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        self._model.generation_config = GenerationConfig(pad_token_id=0)  # no end of sequence
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_GREEDY
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


def base_model(directory: Path) -> PreTrainedModel:
    """A model without its head."""
    model = AutoModel.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def last_state(model: PreTrainedModel, prompt: list[int]) -> NDArray[np.float64]:
    """The hidden state of the last token, behind the final norm."""
    with torch.inference_mode():
        states = model(torch.tensor([prompt])).last_hidden_state
    return states[0, -1].numpy().astype(np.float64)
