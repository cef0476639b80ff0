"""Duetto's side: python in_duetto.py MODEL PRECISION REPEATS CELL... (JSON lines)."""

import sys

from workload import CELLS, measure

from duetto import LLM, SamplingParams


def main() -> None:
    model, precision, repeats, *cells = sys.argv[1:]
    quantization = None if precision == "bf16" else precision
    most = max(size for _, size in CELLS.values())
    with LLM(
        model,
        backend="cpu",
        quantization=quantization,
        enable_prefix_caching=False,
        max_model_len=most + 256,
        max_num_seqs=32,
    ) as llm:

        def generate(prompts: list[list[int]], num_tokens: int) -> None:
            params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
            llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)

        measure(generate, cells, int(repeats))


if __name__ == "__main__":
    main()
