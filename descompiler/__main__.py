"""``python -m descompiler``: the command line."""

from descompiler.cli import main

main()
