"""Part `quantized`: a decode step with projections in each format."""

from typing import Any

from gpu.bench import Bench
from gpu.device_model import DeviceModel, decoding


def run(bench: Bench) -> dict[str, Any]:
    bench.close()
    batch, context = bench.sizes.decode[0]
    found = []
    for format in (None, "int4") if bench.rehearse else (None, "int8", "int4", "fp8"):
        if format == "fp8" and not bench.rehearse and bench.capability < (8, 9):
            continue
        model = DeviceModel.open(bench, "llama-3-8b", [decoding(batch, context)], format)
        seconds = bench.watch.median(model.replay(batch, context), bench.sizes.runs)
        of_read = model.decode_bytes(batch, context) / seconds / bench.roof("read_bandwidth")
        found.append({"format": format or "bfloat16", "seconds": seconds, "of_read": of_read})
        del model
        bench.tidy()
    return {"weights": found}
