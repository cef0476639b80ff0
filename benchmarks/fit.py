"""Predicted against measured peak memory of a running engine.

    python benchmarks/fit.py path/to/checkpoint ... [--quantization none int8]

For each model and precision, `duetto fit` predicts (weights, KV, activations), and a fresh process
then loads the model, and serves until every KV block has been written and the largest step has run.
What it holds beyond what it held after the same for a tiny model (interpreter, libraries, threads)
is the measured peak. Resident memory, from /proc: Linux only. Writes docs/benchmarks/fit.md; the
last line of stdout is one JSON document.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from in_process import machine, markdown_table, new_engine, today

from duetto.build import Built, build
from duetto.core.engine_args import EngineArgs
from duetto.core.request import Request
from duetto.core.sampling_params import SamplingParams
from duetto.fit import examine

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks" / "fit.md"
PREDICTED = ("weight_bytes", "kv_bytes", "activation_bytes")


def predict(model: str, args: EngineArgs) -> dict[str, int]:
    report = examine(model, args)
    return {name: report[name] for name in PREDICTED}


def memory(name: str) -> int:
    """VmRSS, what is held now; VmHWM, the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's resident memory")


def forget_peak() -> None:
    """See https://docs.kernel.org/filesystems/proc.html, clear_refs."""
    Path("/proc/self/clear_refs").write_text("5")


def fill(built: Built, args: EngineArgs) -> None:
    """Write every KV block, and run the largest step."""
    args = replace(args, enable_prefix_caching=False)
    config, engine = built.scheduler_config, new_engine(built, args)
    room = config.num_blocks * config.block_size
    length = min(config.max_model_len, room)
    count = min(config.max_num_seqs, max(1, room // length))
    # None may end before all have begun, or blocks would be used twice and others never.
    num_output = min(length // 2, count * (length // config.max_num_batched_tokens + 2))
    for number in range(count):
        engine.add(_request(str(number), length - num_output, num_output))
    while engine.has_work:
        engine.step()


def _request(name: str, length: int, num_output: int) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=tuple((int(name) + i) % 97 for i in range(length)),
        sampling=SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True),
        max_tokens=num_output,
        seed=0,
    )


def measure(model: str, args: EngineArgs) -> int:
    """In this process, which must be fresh. Bytes beyond those of a tiny model."""
    with TemporaryDirectory() as folder:
        tiny = str(Path(folder) / "tiny")
        command = [sys.executable, "-m", "duetto", "make-model", "tiny", tiny]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        small = replace(args, kv_cache_memory_bytes=2**20, max_model_len=256)
        fill(build(tiny, small), small)
    before = memory("VmRSS")
    built = build(model, args)
    forget_peak()  # loading may have held more for a moment
    fill(built, args)
    return memory("VmHWM") - before


def compare(model: str, args: EngineArgs) -> dict[str, float]:
    """Predicted, and measured by a child process."""
    child = {name: getattr(args, name) for name in CHILD_ARGS}
    command = [sys.executable, __file__, "--child", json.dumps([model, child])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    predicted, measured = predict(model, args), int(done.stdout.splitlines()[-1])
    total = sum(predicted.values())
    return {**predicted, "predicted": total, "measured": measured, "error": total / measured - 1}


CHILD_ARGS = (
    *("backend", "quantization", "kv_cache_dtype", "dtype"),
    *("kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs", "max_model_len"),
    "target_itl",
)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--quantization", nargs="+", default=["none"])
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto"])
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=256 * 2**20)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--output", type=Path, default=PAGE)
    return parser.parse_args()


def page(table: str, options: argparse.Namespace, where: str) -> str:
    names = " ".join(Path(model).name for model in options.models)
    return f"""# What fits, predicted and measured

Written by `benchmarks/fit.py` on {today()}; do not edit.
Machine: {where}.

`duetto fit` reads a model's `config.json` and the headers of its weights. The measured peak is the
resident memory of a process that has written every KV block and run the largest step
({options.max_num_batched_tokens} tokens, {options.max_num_seqs} requests), beyond what the same
process holds with a tiny model.

{table}

## Again

```sh
python benchmarks/fit.py {names} \\
  --quantization {" ".join(options.quantization)} \\
  --kv-cache-memory-bytes {options.kv_cache_memory_bytes}
```
"""


def main() -> None:
    options = parse_options()
    if options.child:
        model, values = json.loads(options.child)
        print(measure(model, EngineArgs(**values)))
        return
    cases = [
        (model, quantization, kv_dtype)
        for model in options.models
        for quantization in options.quantization
        for kv_dtype in options.kv_cache_dtype
    ]
    rows, found = [], []
    for model, quantization, kv_dtype in cases:
        args = EngineArgs(
            backend=options.backend,
            quantization=quantization,
            kv_cache_dtype=kv_dtype,
            kv_cache_memory_bytes=options.kv_cache_memory_bytes,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
            target_itl="off",  # the largest step is to be seen
        )
        case = compare(model, args)
        name = f"{Path(model).name}, {quantization}, KV {kv_dtype}"
        found.append({"case": name, **case})
        sizes = (f"{case[key] / 2**20:.1f}" for key in (*PREDICTED, "predicted", "measured"))
        rows.append([name, *sizes, f"{case['error']:+.1%}"])
    header = ["MiB", "weights", "KV", "activations", "predicted", "measured", "error"]
    table = markdown_table(header, rows)
    print(table)
    options.output.write_text(page(table, options, machine()), encoding="utf-8")
    print(json.dumps({"benchmark": "fit", "date": today(), "machine": machine(), "rows": found}))


if __name__ == "__main__":
    main()
