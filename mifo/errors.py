"""The one exception that a user of MIFO is meant to read."""


class MifoError(Exception):
    """A refusal in one sentence that names what is wrong and how to put it right.

    The command line prints it without a traceback and exits with code 2.
    """
