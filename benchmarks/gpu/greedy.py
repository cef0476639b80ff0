"""Part `greedy`: tiny random models of each type in fp32, whose greedy tokens must be those that
transformers gives on the same device.

Compared up to the first token whose two best logits are nearer than rounding: there both are right.
"""

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from duetto.core.sampling_params import SamplingParams
from duetto.llm import LLM
from duetto.models.make_model import make_model
from gpu.bench import Bench
from gpu.engine import VOCAB

NEAR = 1e-3  # of the logits' spread
TINY: dict[str, Any] = {
    "vocab_size": VOCAB + 20,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
}
TYPES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 48},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "num_attention_heads": 2},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "num_attention_heads": 2, "pad_token_id": 0},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "sliding_window": 48,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 48,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def run(bench: Bench) -> dict[str, Any]:
    bench.close()
    lengths, count = ((9,), 3) if bench.rehearse else ((1, 33, 130), 48)
    types = ("llama",) if bench.rehearse else tuple(TYPES)
    found, wrong = {}, []
    for model_type in types:
        with TemporaryDirectory() as folder:
            model = Path(folder) / model_type
            config = TINY | {"model_type": model_type} | TYPES[model_type]
            make_model(config, model, dtype="float32")
            prompts = [_prompt(length) for length in lengths]
            theirs = _theirs(model, prompts, count, bench)
            ours = _ours(model, prompts, count)
        alike = [_same(a, b, sure) for a, (b, sure) in zip(ours, theirs, strict=True)]
        found[model_type] = {"compared": sum(n for n, _ in alike), "tokens": len(lengths) * count}
        wrong += [
            f"{model_type}: {len(p)} tokens"
            for p, (_, ok) in zip(prompts, alike, strict=True)
            if not ok
        ]
    if wrong:
        raise RuntimeError(f"other tokens than transformers: {'; '.join(wrong)}; {found}")
    return {"types": found}


def _prompt(length: int) -> list[int]:
    draw = random.Random(length)
    return [draw.randrange(3, VOCAB) for _ in range(length)]


def _ours(model: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    sizes = {"kv_cache_memory_bytes": 1 << 24, "max_num_seqs": 4}
    with LLM(model, backend="cuda", dtype="float32", **sizes) as llm:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(asked, params, use_tqdm=False)
        return [one.outputs[0].token_ids for one in outputs]


def _theirs(
    model: Path, prompts: list[list[int]], count: int, bench: Bench
) -> list[tuple[list[int], int]]:
    """Tokens, and how many of them are sure."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  takes seconds to load

    library = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    library = library.eval().to(bench.device)
    found = []
    for prompt in prompts:
        tokens, sure = list(prompt), []
        for _ in range(count):
            with torch.inference_mode():
                logits = library(torch.tensor([tokens], device=bench.device)).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            sure.append(best - second > NEAR * float(logits.std()))
            tokens.append(int(logits.argmax()))
        num_sure = sure.index(False) if False in sure else count
        found.append((tokens[len(prompt) :], num_sure))
    return found


def _same(ours: list[int], theirs: list[int], num_sure: int) -> tuple[int, bool]:
    return num_sure, ours[:num_sure] == theirs[:num_sure]
