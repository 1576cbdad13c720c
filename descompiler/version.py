"""The release's number: read from here by the package and by its build, so that a checkout has it uninstalled too."""

VERSION = "0.1.0"
