"""Where the command line starts. Its imports take a moment, in which Ctrl-C may come already."""

import sys
from importlib import import_module


def main() -> None:
    try:
        import_module("duetto.cli.app").main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
