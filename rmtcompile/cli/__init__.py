"""The command line: `rmtcompile demo`, `explain`, `bench` and the others."""

from rmtcompile.cli.commands import main

__all__ = ["main"]
