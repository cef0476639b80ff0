"""Parts of the whole engine, on a checkpoint in the shape of Llama-3-8B: `load`, `generate`,
`transformers`. The server is in server.py."""

import random
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch

from duetto.core.sampling_params import SamplingParams
from duetto.llm import LLM
from gpu.bench import Bench
from gpu.checkpoint import checkpoint, size_of

VOCAB = 300  # below it all ids have a token
KV_BYTES = 14 << 30  # for 64 requests of some 1,200 tokens, and what pads them


def open_llm(bench: Bench) -> LLM:
    """The checkpoint, on the device. An LLM that an earlier part has opened is taken on."""
    found = bench.kept.get("llm")
    if found is None:
        found = bench.kept["llm"] = LLM(checkpoint(bench), **engine_args(bench))
    llm: LLM = found
    return llm


def engine_args(bench: Bench) -> dict[str, Any]:
    longest = 4 * (bench.sizes.prompt + bench.sizes.answer)
    return {
        "backend": "cuda",
        "kv_cache_memory_bytes": 1 << 22 if bench.rehearse else KV_BYTES,
        "max_model_len": longest,
        "max_num_seqs": max(*bench.sizes.generated, bench.sizes.streams),
        "enable_prefix_caching": False,
    }


def load(bench: Bench) -> dict[str, Any]:
    """Seconds from a checkpoint in memory to an engine that answers."""
    bench.close()
    start = perf_counter()
    folder = checkpoint(bench)
    written_s = perf_counter() - start
    for file in folder.glob("*.safetensors"):  # into the page cache, if it is not there
        with file.open("rb") as content:
            while content.read(1 << 26):
                pass
    start = perf_counter()
    llm = open_llm(bench)
    started_s = perf_counter() - start
    start = perf_counter()
    llm.generate({"prompt_token_ids": [1, 2, 3]}, _params(1), use_tqdm=False)
    return {
        "file_bytes": size_of(folder),
        "written_s": written_s,
        "started_s": started_s,
        "notes": list(llm._built.notes),
        "first_answer_s": perf_counter() - start,
    }


def generate(bench: Bench) -> dict[str, Any]:
    """Tokens in a second while all requests decode, and that beside the bare graph's."""
    llm = open_llm(bench)
    bare = {
        tuple(one["at"]): one["ours_s"] for one in bench.found.get("decode", {}).get("steps", ())
    }
    found = []
    for batch in bench.sizes.generated:
        if not bench.rehearse:  # there, kernels are compiled
            _rates(llm, bench, batch, seed=0)
        rate, mean_rate = _rates(llm, bench, batch, seed=1)
        step_s = next((s for (b, context), s in bare.items() if b == batch and context <= 1024), 0)
        of_graph = rate * step_s / batch if step_s else None
        one = {"batch": batch, "tokens_per_s": rate, "mean_tokens_per_s": mean_rate}
        found.append(one | {"of_graph": of_graph})
    bench.close()
    return {"prompt": bench.sizes.prompt, "answer": bench.sizes.answer, "batches": found}


def _rates(llm: LLM, bench: Bench, batch: int, seed: int) -> tuple[float, float]:
    """Tokens per second by the median gap between tokens, and by all the time that there were
    only next tokens."""
    draw = random.Random(seed)
    prompts = [
        {"prompt_token_ids": [draw.randrange(3, VOCAB) for _ in range(bench.sizes.prompt)]}
        for _ in range(batch)
    ]
    outputs = llm.generate(prompts, _params(bench.sizes.answer), use_tqdm=False)
    times = [one.outputs[0].timings.token_times for one in outputs]  # type: ignore[union-attr]
    if any(len(own) != bench.sizes.answer for own in times):
        raise RuntimeError(f"answers of {[len(own) for own in times]} tokens")
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    gaps = [b - a for own in times for a, b in pairwise(own) if begin <= a < end]
    if not gaps:  # the first had ended when the last began
        raise RuntimeError("no step had next tokens of all requests")
    return batch / median(gaps), len(gaps) / (end - begin)


def _params(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def transformers(bench: Bench) -> dict[str, Any]:
    """transformers' generate on random weights of the same shape, by two lengths of answers."""
    bench.close()
    model = _transformers_model(bench)
    found = []
    for batch in (1, 2) if bench.rehearse else (1, 32):
        ids = torch.randint(3, VOCAB, (batch, bench.sizes.prompt), device=bench.device)
        few, many = 1, bench.sizes.answer // 4 + 1
        _generated_s(model, ids, 2, bench)
        first_s = _generated_s(model, ids, few, bench)
        step_s = (_generated_s(model, ids, many, bench) - first_s) / (many - few)
        found.append({"batch": batch, "prompt_s": first_s, "step_s": step_s})
    return {"version": _version(), "batches": found}


def _transformers_model(bench: Bench) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  takes seconds to load

    config = bench.config("llama-3-8b")
    sizes = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=len(config.layers),
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=8192,
        eos_token_id=None,
    )
    torch.set_default_dtype(bench.dtype)
    try:
        with bench.device:
            return LlamaForCausalLM(sizes).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def _generated_s(model: Any, ids: torch.Tensor, count: int, bench: Bench) -> float:
    bench.wait()
    start = perf_counter()
    mask = torch.ones_like(ids)
    limits = {"max_new_tokens": count, "min_new_tokens": count}
    model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **limits)
    bench.wait()
    return perf_counter() - start


def _version() -> str:
    import transformers as library  # noqa: PLC0415

    return str(library.__version__)
