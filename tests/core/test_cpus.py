"""The package on a system that has less than Linux."""

import subprocess
import sys

from duetto.core.cpus import usable_cpus

ONLY_LINUX = """
import importlib, mmap, os, pkgutil, select, signal, sys

for module, names in {
    os: ["sched_getaffinity", "sched_setaffinity", "sched_getscheduler", "pidfd_open",
         "memfd_create", "posix_fadvise", "posix_fallocate", "copy_file_range", "eventfd",
         "getrandom", "splice", "setns", "O_DIRECT", "O_NOATIME", "O_PATH", "O_TMPFILE"],
    select: ["epoll"],
    signal: ["sigtimedwait", "sigwaitinfo", "SIGSTKFLT", "SIGPWR"],
    mmap: [name for name in dir(mmap) if name.startswith("MADV_") and name != "MADV_WILLNEED"],
}.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
import duetto
for found in pkgutil.walk_packages(duetto.__path__, "duetto."):
    is_gpu = found.name.startswith("duetto.backends.cuda.")  # needs torch, an extra
    if not found.name.endswith(("__main__", "_native")) and not is_gpu:
        importlib.import_module(found.name)

from duetto.core.cpus import usable_cpus
from duetto.measure.installation import describe_installation
from duetto.pricing.host import _guess

assert usable_cpus() == os.cpu_count() == describe_installation()["cpus_usable"]
assert _guess().peaks["float32"] > 0
"""


def test_all_is_imported_where_there_is_no_linux() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ONLY_LINUX], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_process_uses_no_more_cpus_than_there_are() -> None:
    assert usable_cpus() >= 1
