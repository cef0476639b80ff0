"""GPUs by name: what their sheets say, and what kernels were fitted to reach of it."""

from typing import Any

from duetto.pricing.hardware import Efficiencies, HardwareSpec, KernelEfficiency

# Fitted by benchmarks/planner_a100.py on half of Vidur's measurements of single operations and half
# of Splitwise's of whole steps, on A100-80G; docs/benchmarks/planner-a100.md has the errors of the
# other half. Attention is at the least that is known of its kernels, as these rows cannot tell. The
# host is an AMD EPYC 7V12 that launches each kernel from Python, as vLLM did in 2023. Without it
# (Deployment.graphs), docs/benchmarks/planner-published.md has other devices and later engines.
GPU_EFFICIENCIES = Efficiencies(
    linear=KernelEfficiency(compute=0.725, memory=0.82, half_rows=71.1, call_s=6.19e-06),
    attention=KernelEfficiency(compute=0.5, memory=0.6, call_s=3e-05),
    norm=KernelEfficiency(memory=0.341, call_s=1.7e-06),
    rope=KernelEfficiency(memory=0.422, call_s=1.05e-06),
    activation=KernelEfficiency(memory=0.497, call_s=1.99e-06),
    add=KernelEfficiency(memory=0.885, call_s=9.51e-07),
    embed=KernelEfficiency(memory=0.145, call_s=2.19e-06),
    copy=KernelEfficiency(memory=0.885, call_s=9.51e-07),
    collective=KernelEfficiency(memory=0.349, call_s=3e-05),
    launch_s=3.48e-05,
    chunk_launch_s=1.85e-05,
    step_s=0.00796,
    logit_row_s=0.000375,
)
# Machines of these GPUs have a Sapphire Rapids or a Genoa instead. From memory, not checked: from a
# Zen 2 at 3.3 GHz to a Zen 3 at 3.5 GHz, whose single-thread scores Sapphire Rapids has, is 1.26 by
# AMD's 19 % per clock; to a Genoa it is about 1.45 by PassMark.
_HOST_OF_2023 = 1.4


def _gpu(**values: Any) -> HardwareSpec:
    return HardwareSpec(
        efficiencies=GPU_EFFICIENCIES,
        date="2026-11-21",
        disk_read_bandwidth=_NVME_READ,
        disk_write_bandwidth=_NVME_WRITE,
        **values,
    )


# How to read the table. Peaks are dense: sheets that say "with sparsity" are halved. Bandwidths are
# the maker's, in units of 1e9. Memory is what the driver shows as the total, which is less than the
# sheet's gigabytes where ECC takes a part. A link's bandwidth is what one device sends: half of
# what sheets call NVLink or Infinity Fabric bandwidth, which is both directions together.
#
# What was checked on the date of `_gpu`: peaks, memory bandwidth and links, against pages that
# quote the maker's sheet (`source` names both; the sheets themselves could not be opened); memory,
# against what nvidia-smi or rocm-smi prints in public logs. From memory, not checked: latencies.
_NVLINK_S = 1.5e-6
_PCIE_S = 5e-6
_PCIE_4 = 32e9  # x16, one direction; sheets say 64 GB/s for both
# What copies of pinned memory reach of x16, one direction, in public logs of nvbandwidth: 25.1 GB/s
# (A100-SXM4, its issue 42) and 24 to 26 (RTX 4090, issue 15) of PCIe 4's 32; 52.8 (H100, issue 24)
# of PCIe 5's 64. For devices that are not named here, their generation's.
_COPY_PCIE_4 = 25e9
_COPY_PCIE_5 = 53e9
# Of one data-centre drive on PCIe 4 x4, as its maker says: Samsung PM9A3, U.2, sequential, quoted
# by computerbase.de and heise.de (2020). What drive a machine has, no GPU's name says.
_NVME_READ = 6.5e9
_NVME_WRITE = 3.5e9
_MIB = 2**20
_HOPPER_PEAKS = {  # of the SXM5 module; H200 differs in its memory only
    "float32": 66.9e12,
    "bfloat16": 989.4e12,
    "float16": 989.4e12,
    "float8": 1978.9e12,
    "int8": 1978.9e12,
}
HARDWARE: dict[str, HardwareSpec] = {
    spec.name: spec
    for spec in (
        _gpu(
            name="a100-80g",
            peaks={"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12, "int8": 624e12},
            memory_bandwidth=2.039e12,
            memory_bytes=81920 * _MIB,
            link_bandwidth=300e9,  # 12 NVLink 3, 600 GB/s both ways
            link_latency_s=_NVLINK_S,
            host_bandwidth=_COPY_PCIE_4,
            source="NVIDIA A100 80GB SXM4 data sheet (2021), as quoted by "
            "glennklockwood.com/garden/processors/A100",
        ),
        _gpu(
            name="h100",
            host_speed=_HOST_OF_2023,
            peaks=_HOPPER_PEAKS,
            memory_bandwidth=3.35e12,
            memory_bytes=81559 * _MIB,
            link_bandwidth=450e9,  # 18 NVLink 4, 900 GB/s both ways
            link_latency_s=_NVLINK_S,
            host_bandwidth=_COPY_PCIE_5,
            source="NVIDIA H100 SXM5, Hopper architecture whitepaper (2022), as quoted by "
            "glennklockwood.com/garden/processors/h100",
        ),
        _gpu(
            name="h200",
            host_speed=_HOST_OF_2023,
            peaks=_HOPPER_PEAKS,
            memory_bandwidth=4.8e12,
            memory_bytes=143771 * _MIB,
            link_bandwidth=450e9,  # as H100
            link_latency_s=_NVLINK_S,
            host_bandwidth=_COPY_PCIE_5,
            source="NVIDIA H200 SXM data sheet (2023), as quoted by aiwiki.ai/wiki/nvidia_h200; "
            "peaks are the H100's, whose die it has",
        ),
        _gpu(
            name="l4",
            peaks={
                "float32": 30.3e12,
                "bfloat16": 121e12,  # half of 242
                "float16": 121e12,
                "float8": 242.5e12,  # half of 485
                "int8": 242.5e12,
            },
            memory_bandwidth=300e9,
            memory_bytes=23034 * _MIB,
            link_bandwidth=_PCIE_4,
            link_latency_s=_PCIE_S,
            host_bandwidth=_COPY_PCIE_4,
            source="NVIDIA L4 data sheet (2023), as quoted by "
            "grokipedia.com/page/NVIDIA_L4_vs_L40S",
        ),
        _gpu(
            name="l40s",
            host_speed=_HOST_OF_2023,
            peaks={
                "float32": 91.6e12,
                "bfloat16": 362.05e12,
                "float16": 362.05e12,
                "float8": 733e12,
                "int8": 733e12,
            },
            memory_bandwidth=864e9,
            memory_bytes=46068 * _MIB,
            link_bandwidth=_PCIE_4,
            link_latency_s=_PCIE_S,
            host_bandwidth=_COPY_PCIE_4,
            source="NVIDIA L40S data sheet (2023), as quoted by "
            "mullet.se/product.html?product_id=355414",
        ),
        _gpu(
            name="rtx4090",
            host_speed=_HOST_OF_2023,
            peaks={
                "float32": 82.6e12,
                "bfloat16": 165.2e12,
                "float16": 165.2e12,  # with fp32 accumulation, as float8
                "float8": 330.3e12,
                "int8": 660.6e12,
            },
            memory_bandwidth=1.008e12,
            memory_bytes=24564 * _MIB,
            link_bandwidth=_PCIE_4,
            link_latency_s=_PCIE_S,
            host_bandwidth=_COPY_PCIE_4,
            source="NVIDIA Ada GPU architecture whitepaper (2022), appendix A, as quoted by "
            "waredb.com/processor/nvidia-geforce-rtx-4090",
        ),
        _gpu(
            name="mi300x",
            host_speed=_HOST_OF_2023,
            peaks={
                "float32": 163.4e12,
                "bfloat16": 1307.4e12,
                "float16": 1307.4e12,
                "float8": 2614.9e12,
                "int8": 2614.9e12,
            },
            memory_bandwidth=5.3e12,
            memory_bytes=196592 * _MIB,
            link_bandwidth=448e9,  # 7 Infinity Fabric links, 896 GB/s both ways
            link_latency_s=2e-6,
            host_bandwidth=_COPY_PCIE_5,
            source="AMD Instinct MI300X data sheet (2023), as quoted by "
            "yobitel.com/knowledge-base/amd-mi300x (peaks are dense, though that page says sparse: "
            "304 units x 2.1 GHz x 2048 at 16 bits); float32 and int8 by units x clock only",
        ),
    )
}
ALIASES = {
    "a100": "a100-80g",
    "a100-80gb": "a100-80g",
    "a100-sxm": "a100-80g",
    "h100-80gb": "h100",
    "h100-sxm": "h100",
    "h200-sxm": "h200",
    "rtx-4090": "rtx4090",
    "4090": "rtx4090",
}


def notes_on_host(hardware: HardwareSpec, arithmetic: str, graphs: bool) -> tuple[str, ...]:
    """Whose host it is that steps are priced with, where its time counts."""
    if graphs or hardware.reached(arithmetic) != GPU_EFFICIENCIES:
        return ()
    return (
        "the host's part of a step is that of vLLM of 2023; without --no-graphs it is left out, as "
        "engines of today nearly do",
    )
