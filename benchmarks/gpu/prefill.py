"""Part `prefill`: whole prompts, and one layer's attention beside torch's own, unpaged."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from duetto.backends.cuda.launch_times import LaunchTimes
from duetto.measure.gpu import step_of
from duetto.program.ops import Attention
from gpu.bench import Bench
from gpu.device_model import DeviceModel, prompt


def run(bench: Bench) -> dict[str, Any]:
    bench.close()
    lengths = bench.sizes.prompts
    model = DeviceModel.open(bench, "llama-3-8b", [prompt(length) for length in lengths])
    product = bench.roof(bench.dtype_name)
    found = []
    for length in lengths:
        seconds = bench.watch.median(model.start(prompt(length)), 1 if bench.rehearse else 5)
        flops = model.prefill_flops(length)
        one = {"tokens": length, "seconds": seconds, "flops": flops}
        found.append(one | {"of_product": flops / seconds / product})
    return {"prompts": found, "attention": _attention(bench, model, lengths[-1])}


def _attention(bench: Bench, model: DeviceModel, length: int) -> dict[str, Any]:
    runs = 1 if bench.rehearse else 5
    times = LaunchTimes(model.program, model.backend, model.kv, bench.watch, runs)
    ours_s, op = next(
        (seconds, op)
        for op, seconds in times.of(step_of(prompt(length)), kinds=("attention",))
        if isinstance(op, Attention)
    )
    options: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
    q = torch.randn(1, op.num_heads, length, op.head_dim, **options)
    k, v = (torch.randn(1, op.num_kv_heads, length, op.head_dim, **options) for _ in range(2))

    def attend() -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return {"tokens": length, "ours_s": ours_s, "torch_s": bench.watch.median(attend, runs)}
