"""Which backend runs a model: what was asked for, or what this machine has. Loads none.

Whatever was asked for beside, that the backend cannot do, is refused here by the name of its flag.
"""

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from duetto.backends.cpu.formats import Quantization
from duetto.backends.cpu.native import why_unavailable
from duetto.core.engine_args import EngineArgs
from duetto.core.errors import ConfigError

if TYPE_CHECKING:  # of a room that only what uses a GPU imports
    from duetto.backends.cuda.device import Gpu

_ONE_GPU = "it computes whole models on one GPU"
_DEVICE = "duetto.backends.cuda.device"


class ChosenBackend(NamedTuple):
    name: str  # cuda, cpu or reference
    gpu: "Gpu | None"
    notes: list[str]  # what is to be said if it is not the one that was wished for


def choose_backend(args: EngineArgs) -> ChosenBackend:
    """Raises ConfigError, naming the flag, for what cannot be."""
    why_not, notes = f"this is --backend {args.backend}", []
    if args.backend == "cuda":
        _check_on_gpu(args)
        return ChosenBackend("cuda", import_module(_DEVICE).find_gpu(), [])
    if args.backend == "auto":
        device = import_module(_DEVICE)
        facts = device.probe_gpu()
        if (why := device.why_not_of_itself(facts)) is None:
            _check_on_gpu(args)
            return ChosenBackend("cuda", device.gpu_of(facts), [])
        why_not = why
        if facts.devices:  # who has none knows that
            notes.append(f"the GPU is not used: {why}")
    _check_on_host(args, why_not)
    name, more = resolve_backend(args.backend, host_quantization(args), args.threads)
    return ChosenBackend(name, None, [*notes, *more])


def _check_on_gpu(args: EngineArgs) -> None:
    why_not = {
        "threads": "a GPU computes",
        "packed_cache": "weights go to the GPU from the checkpoint itself",
        "tensor_parallel_size": _ONE_GPU,
        "pipeline_parallel_size": _ONE_GPU,
    }
    given = {
        "threads": args.threads is not None,
        "packed_cache": args.packed_cache not in ("auto", "off"),
        "tensor_parallel_size": args.tensor_parallel_size > 1,
        "pipeline_parallel_size": args.pipeline_parallel_size > 1,
    }
    for option, why in why_not.items():
        if given[option]:
            raise ConfigError(
                f"--{option.replace('_', '-')} {getattr(args, option)} and the cuda backend: "
                f"{why}; leave it out, or say --backend cpu"
            )


def _check_on_host(args: EngineArgs, why_no_gpu: str) -> None:
    """Raise ConfigError for what only a GPU has."""
    given = {
        "gpu_memory_utilization": args.gpu_memory_utilization is not None,
        "quantization": args.quantization == "fp8",
        "kv_cache_dtype": args.kv_cache_dtype == "fp8",
    }
    for option, is_given in given.items():
        if is_given:
            raise ConfigError(
                f"--{option.replace('_', '-')} {getattr(args, option)}: is for --backend cuda, but "
                f"{why_no_gpu}"
            )


def host_quantization(args: EngineArgs) -> Quantization | None:
    """What the cpu backend quantizes to."""
    return args.quantization if args.quantization in ("int8", "int4") else None


def resolve_backend(
    name: str, quantization: Quantization | None = None, threads: int | None = None
) -> tuple[str, list[str]]:
    """The host's backend to use, and what is to be said if it is not the one that was wished for.
    auto is cpu, or the reference where the native module is missing."""
    missing = why_unavailable() if name != "reference" else None
    if name == "cpu" and missing is not None:
        raise ConfigError(f"--backend cpu: {missing}")
    if name != "reference" and missing is None:
        return "cpu", []
    if quantization is not None:
        reason = f", and {missing}" if missing else ""
        raise ConfigError(
            f"--quantization {quantization} and the reference backend: it computes with whole "
            f"weights only; --backend cpu quantizes{reason}"
        )
    if threads is not None and threads > 1:
        raise ConfigError(
            f"--threads {threads} and the reference backend: it computes on one thread"
        )
    if missing is None:
        return "reference", []
    return "reference", [f"the reference backend computes, which is slow: {missing}"]
