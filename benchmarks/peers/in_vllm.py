"""vLLM's side: python in_vllm.py MODEL REPEATS CELL... (JSON lines)."""

import sys

from vllm import LLM, SamplingParams
from workload import measure


def main() -> None:
    model, repeats, *cells = sys.argv[1:]
    llm = LLM(
        model, dtype="bfloat16", max_model_len=2304, max_num_seqs=32, enable_prefix_caching=False
    )

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    measure(generate, cells, int(repeats))


if __name__ == "__main__":
    main()
