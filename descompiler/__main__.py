"""``python -m descompiler``: the command line."""

from descompiler.cli.app import main

main()
