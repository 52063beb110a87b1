"""The one exception that a user of MIFO is meant to read."""

import sys
from typing import NoReturn


class MifoError(Exception):
    """A refusal in one sentence that names what is wrong and how to put it right.

    The command line prints it without a traceback and exits with code 2.
    """


def refuse(reason: str) -> NoReturn:
    """End the process with one sentence and exit code 2."""
    print("mifo: error:", " ".join(reason.split()), file=sys.stderr)
    sys.exit(2)
