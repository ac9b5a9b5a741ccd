"""The program ``autoq``, also as ``python -m autoq``."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    try:
        from autoq.cli import run

        code = run()
    except KeyboardInterrupt:  # before the command line is there, or once more while it stops
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
