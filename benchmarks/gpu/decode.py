"""Parts `decode` and `small`: steps of next tokens as one graph, beside plain torch's, in turns."""

from collections.abc import Sequence
from typing import Any

from duetto.backends.cuda.limits import graph_sizes
from duetto.core.options import MAX_NUM_SEQS
from gpu.bench import Bench
from gpu.device_model import DeviceModel, decoding
from gpu.plain_torch import PlainLlama


def run(bench: Bench) -> dict[str, Any]:
    return _measure(bench, "llama-3-8b", bench.sizes.decode, bench.sizes.torch_at)


def small(bench: Bench) -> dict[str, Any]:
    return _measure(bench, "llama-3.2-1b", bench.sizes.small_decode, ())


def _measure(
    bench: Bench, name: str, steps: Sequence[tuple[int, int]], torch_at: Sequence[int]
) -> dict[str, Any]:
    bench.close()
    num_runs = 2 if bench.rehearse else MAX_NUM_SEQS
    model = DeviceModel.open(bench, name, [decoding(*at) for at in steps], num_runs=num_runs)
    plain = PlainLlama(bench.config(name), bench.device, bench.dtype) if torch_at else None
    found = []
    for batch, context in steps:
        launches = [model.replay(batch, context)]
        if plain is not None and batch in torch_at and context <= 1024:
            launches.append(bench.watch.graphed(plain.decoding(batch, context)))
        seconds = bench.watch.paired(launches, *((1, 1) if bench.rehearse else (5, 6)))
        of_read = model.decode_bytes(batch, context) / seconds[0] / bench.roof("read_bandwidth")
        found.append(
            {
                "at": [batch, context],
                "ours_s": seconds[0],
                "torch_s": seconds[1] if len(seconds) > 1 else None,
                "of_read": of_read,
            }
        )
        del launches
        bench.tidy()
    graphs = {"seconds": model.graphs_s, "count": len(graph_sizes(num_runs))}
    return {"model": name, "steps": found, "graphs": graphs}
