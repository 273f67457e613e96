"""The commands of a federation between organisations: provision, serve, join. Thin, like those of runs.py.

They need the extra `distributed`; without it, each ends with an error message (common/extras.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.app import Overrides, RecipeName, adapter_folder, command, err, note, out, show_checks
from fedloom.common.extras import needing_extras
from fedloom.recipe.overrides import parse_overrides


@command
def provision(
    project: Annotated[Path, typer.Argument(metavar="PROJECT", help="the project file: server, sites, admin")],
    out_: Annotated[Path, typer.Option("--out", help="the folder to write the kits into")] = Path("kits"),
) -> None:
    """Make the certificates and folders of a federation: one kit for the server, one for each site, one for the admin."""
    from fedloom.runtimes.sites.project import Project

    chosen = Project.load(project)
    with needing_extras():
        from fedloom.runtimes.sites.flare import kits
    for folder in kits.provision(chosen, out_):
        out.print(f"kit      {folder}", markup=False)
    out.print(f"keep     {out_ / 'authority'} secret: whoever has it can add sites to the federation", markup=False)


@command
def serve(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="the server's kit")],
    recipe: RecipeName,
    overrides: Overrides = None,
    out_: Annotated[Path | None, typer.Option("--out", help="the run's folder; runs/NAME by default")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue from the newest checkpoint in the folder")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the run in the folder")] = False,
    admin: Annotated[
        Path | None, typer.Option("--admin", help="the admin's kit; beside the server's by default")
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option("--wait", help="seconds to wait for missing sites before the run begins without them"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print the result only")] = False,
) -> None:
    """Run a recipe among the sites of a federation, as its server."""
    from fedloom.cli.console import Display, result_table
    from fedloom.federation.record.run_folder import RunFolder, recipe_and_folder
    from fedloom.reporting.summary_types import read_summary

    with needing_extras():
        from fedloom.experiment import sites
        from fedloom.runtimes.sites.supervisor import Server
    server = Server.open(kit, admin)
    values = {**parse_overrides(overrides or []), "runtime.name": "distributed"}
    chosen, folder = recipe_and_folder(recipe, values, out_, resume)
    with Display(err, quiet=quiet) as display:
        sites.serve(server, chosen, folder, resume=resume, overwrite=overwrite, watch=display.watch(), wait=wait)
    if summary := read_summary(RunFolder(folder)):
        out.print(result_table(summary))
    out.print(f"adapter  {adapter_folder(folder)}", markup=False)
    out.print(f"report   {folder / 'report.html'}", markup=False)


@command
def join(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="this site's kit")],
    data: Annotated[
        str | None, typer.Option("--data", help="this site's data file or folder; kept for the next time")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", metavar="ROLE=COLUMN", help="such as instruction=question")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="the base model's folder on this machine")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="examples in one forward pass here")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:0 …")] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads, divided among ranks")] = None,
    ranks: Annotated[int | None, typer.Option("--ranks", help="processes that train together here")] = None,
    parallel: Annotated[
        str | None, typer.Option("--parallel", help="how the ranks share the work: ddp or fsdp")
    ] = None,
    keep_runs: Annotated[
        int | None, typer.Option("--keep-runs", help="runs whose state stays here; older ones are deleted (5)")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="check the kit, the data and the settings, and do not join")
    ] = False,
) -> None:
    """Take part in a federation as one of its sites, until interrupted; data and settings stay here."""
    import time

    settings = {
        "data": data, "columns": parse_overrides(column) if column else None, "model": model,
        "batch_size": batch_size, "device": device, "threads": threads, "ranks": ranks, "parallel": parallel,
        "keep_runs": keep_runs,
    }  # fmt: skip
    with needing_extras():
        from fedloom.runtimes.sites.checks import checks
        from fedloom.runtimes.sites.join import Joined, settle
    site = settle(kit, settings)
    if check:
        show_checks(checks(kit, site))
        return
    joined = Joined(kit)
    out.print(f"joining  as {site.client}; audit log {Path(site.home) / 'audit.jsonl'}", markup=False)
    try:
        while True:
            for text in joined.look():
                note(text)
            time.sleep(1.0)
    except KeyboardInterrupt:
        err.print("fedloom: interrupted; this site takes no part until it joins again", markup=False)
        raise typer.Exit(130) from None
    finally:
        joined.close()
