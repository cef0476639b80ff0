"""The table of kernels: what it says of one that spills, has no room, or does not compile."""

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "kernel_table.py"
SPEC = spec_from_file_location("kernel_table", TOOL)
kernel_table = module_from_spec(SPEC)
SPEC.loader.exec_module(kernel_table)

KERNELS = """
import sys
sys.path.insert(0, {tools!r})
import triton
import triton.language as tl
from kernel_table import Job, compile_variant, source_of
import kernel_table
from duetto.backends.cuda.kernels.variant import KernelVariant

@triton.jit
def add(x, y, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)

good = KernelVariant("good", add, {{"x": "*fp32", "y": "*fp32", "n": "i32"}}, {{"SIZE": 64}}, {{}})
odd = good._replace(name="odd", constexprs={{"SIZE": 60}})
lacking = good._replace(name="lacking", constexprs={{}})

if __name__ == "__main__":
    kernel_table.variants_of = lambda file: [good, odd]
    print(compile_variant(Job("f", 0, 90))[1])
    print(compile_variant(Job("f", 1, 90))[1])
    try:
        source_of(lacking)
    except ValueError as error:
        print(error)
"""


def test_spilled_registers_are_shown():
    usage = kernel_table.Usage(255, 49152, 40)
    text = kernel_table.in_words([kernel_table.Row("linear", "bf16", 8, {90: usage})])
    assert "| linear | bf16 | 8 | – | 255, 48.0 KiB, **40 B spilled** | – |" in text
    assert "spilled" not in str(usage._replace(stack_bytes=0))


def test_more_shared_memory_than_the_chip_has_is_a_problem():
    usage = kernel_table.Usage(128, 100 * 1024, 0)
    assert kernel_table.problem_of(90, usage) is None
    assert "102400 bytes of shared memory, of 101376" in kernel_table.problem_of(120, usage)


def test_a_kernel_is_compiled_and_one_that_cannot_be_says_why(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KERNELS.format(tools=str(TOOL.parent)))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    good, odd, lacking = run.stdout.splitlines()
    registers, shared = good.split(", ")
    assert 0 < int(registers) < 64 and shared == "0.0 KiB"
    assert "power of 2" in odd
    assert lacking == "lacking: arguments that are not named once: ['SIZE']"
