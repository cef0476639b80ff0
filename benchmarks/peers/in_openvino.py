"""OpenVINO GenAI's side: python in_openvino.py IR_DIR GROUP REPEATS CELL... (JSON lines).

GROUP: DYNAMIC_QUANTIZATION_GROUP_SIZE (int8 activations), or 0 to leave the plug-in's default.
"""

import sys

import numpy as np
import openvino as ov
import openvino_genai as genai
from workload import measure


def main() -> None:
    directory, group, repeats, *cells = sys.argv[1:]
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2  # GiB of KV
    scheduler.max_num_batched_tokens = 4096
    scheduler.enable_prefix_caching = False
    properties = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": group} if int(group) else {}
    pipe = genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", properties)

    def generate(prompts: list[list[int]], num_tokens: int) -> None:
        config = genai.GenerationConfig()
        config.max_new_tokens = num_tokens
        config.ignore_eos = True
        config.do_sample = False
        pipe.generate(
            [ov.Tensor(np.array([ids], np.int64)) for ids in prompts], [config] * len(prompts)
        )

    measure(generate, cells, int(repeats))


if __name__ == "__main__":
    main()
