"""The `sparsekit` command: prune, train, eval, bench, doctor, demo.

Exit status: 0 done, 1 failed, 2 bad arguments, 130 interrupted. `--json FILE` ("-" for stdout) holds all that was
shown, and the error where there was one.
"""

import signal
import sys
from types import FrameType

from sparsekit.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; a terminated process cleans up as an interrupted one does."""
    signal.signal(signal.SIGTERM, _terminated)
    app()


def _terminated(_number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signal.SIGTERM)
