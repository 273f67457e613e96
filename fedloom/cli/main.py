"""The entry point of the command line, with all commands."""

from __future__ import annotations

from typing import Annotated

import typer

from fedloom.cli import benchmarks, runs, sites  # noqa: F401  (importing registers their commands)
from fedloom.cli.app import app, out


def version_(value: bool) -> None:
    if value:
        from fedloom.common.version import __version__

        out.print(f"fedloom {__version__}", markup=False)
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=version_, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Take the options before the command."""


def main() -> None:
    """The entry point of the `fedloom` command."""
    app(prog_name="fedloom")
