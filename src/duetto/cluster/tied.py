"""Runs a command that ends when the process that started it does, however that ends.

    python -m duetto.cluster.tied PARENT COMMAND...

Linux tells a child of its parent's death; elsewhere the command is run as it is.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != int(parent):  # it ended before it could be told
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
