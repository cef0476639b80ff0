"""What is to be run on a GPU, by worth: what comes first is had first if time runs out.

Standard library only: who runs the parts imports this, and no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """One question. `run(bench)` in its module answers with what can be written as JSON."""

    name: str
    title: str
    limit_s: float  # after which it is stopped, and the next goes on
    module: str = ""  # in benchmarks/gpu; by default of the part's name

    @property
    def home(self) -> str:
        return f"gpu.{self.module or self.name}"


PARTS = (
    Part("smoke", "One kernel beside its twin", 45, "checks"),
    Part("roofs", "What the device gives", 30),
    Part("decode", "A decode step of an 8B model", 90),
    Part("bits", "The same bits in any company", 60),
    Part("prefill", "Prefill, and attention alone", 60),
    Part("quantized", "int8, int4 and fp8 weights", 60),
    Part("greedy", "Greedy tokens beside transformers", 60),
    Part("small", "A decode step of a 1.2B model", 30, "decode"),
    Part("tests", "The kernels' tests on the device", 65, "checks"),
    Part("load", "An 8B checkpoint to the device", 60, "engine"),
    Part("generate", "The engine beside its graphs", 60, "engine"),
    Part("server", "A server, with long prompts beside streams", 90),
    Part("transformers", "transformers' own generate", 45, "engine"),
    Part("calibrate", "Prices of this device", 60),
    Part("sanitizer", "compute-sanitizer over small tests", 60, "checks"),
    Part("tuning", "Tiles, tried", 120),
)
NAMES = tuple(part.name for part in PARTS)
