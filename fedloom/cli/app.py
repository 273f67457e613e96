"""The Typer application, its consoles, and the exit codes of errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedloom.common.errors import RunFailed, UserError, describe_disk_error

if TYPE_CHECKING:
    from fedloom.runtimes.doctor import Check

app = typer.Typer(
    name="fedloom",
    help="Fine-tune large language models on data of many owners, which stays with them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


out = Console(highlight=False, soft_wrap=True)


err = Console(stderr=True, highlight=False, soft_wrap=True)


RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="a built-in recipe, a YAML file, or a run's folder")]


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="recipe keys to change, such as train.lr=1e-3")
]


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command. Its UserError, RunFailed, and disk errors become one message and an exit code."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as error:
            err.print(f"fedloom: {error}", markup=False)
            raise typer.Exit(2) from None
        except RunFailed as error:
            err.print(f"fedloom: {error}", markup=False)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            err.print("fedloom: interrupted; finished rounds are kept, continue with --resume", markup=False)
            raise typer.Exit(130) from None
        except Exception as error:
            trouble = describe_disk_error(error)
            if trouble is None:
                raise
            err.print(f"fedloom: {trouble}: free some space, or name another folder", markup=False)
            raise typer.Exit(1) from None

    app.command(name=function.__name__.rstrip("_"))(wrapped)
    return wrapped


def note(text: str) -> None:
    """Print a log message while a command works."""
    err.print(text, markup=False)


def adapter_folder(folder: Path) -> Path:
    """Return where a run's adapter is: `adapter`, or `adapters` where each client has its own."""
    return next((folder / n for n in ("adapter", "adapters") if (folder / n).is_dir()), folder)


def show_checks(found: Iterable[Check]) -> None:
    """Print a table of checks. Raises RunFailed where one is bad."""
    table = Table("", "check", "found", "how to fix it", box=None, pad_edge=False)
    bad = 0
    for check in found:
        bad += check.level == "bad"
        mark = {"good": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[red]bad[/]"}[check.level]
        table.add_row(mark, *(escape(text) for text in (check.name, check.found, check.fix)))
    out.print(table)
    if bad:
        raise RunFailed(f"{bad} check{'s' * (bad != 1)} failed: the last column says how to fix it")
