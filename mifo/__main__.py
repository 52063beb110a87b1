"""`python -m mifo` is the command `mifo`."""

from mifo.cli import main

main()
