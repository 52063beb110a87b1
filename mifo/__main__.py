"""`python -m mifo` is the command `mifo`."""

import sys
from pathlib import Path

from mifo.cli import main

# Python puts the working folder first; only a checkout in which MIFO itself lies may be a place of modules
if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    del sys.path[0]
main()
