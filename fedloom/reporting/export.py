"""Export a run's result: the adapter in peft's format, or the model with the adapter merged in.

A merged model is a folder for transformers, or one GGUF file for llama.cpp.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from fedloom.common.errors import UserError, suggest
from fedloom.common.files import folder_name
from fedloom.federation.record.run_folder import RunFolder
from fedloom.recipe.recipe import Recipe
from fedloom.reporting.card import write_card
from fedloom.reporting.summary_types import read_summary

log = logging.getLogger(__name__)

FORMATS = ("peft", "merged", "gguf")


#: The default dtype of GGUF.
DTYPE = "f16"


def result_folder(run: Path, client: str | None = None) -> Path:
    """Return the folder of a run's adapter: the global one, or a client's own. Raises UserError where there is none."""
    if not RunFolder(run).holds_a_run:
        raise UserError(
            f"{run} is not a run folder: it has no recipe.yaml; give a folder that `fedloom run` wrote, such as runs/NAME"
        )
    if client is None and (run / "adapter").is_dir():
        return run / "adapter"
    personal = run / "adapters"
    if personal.is_dir():
        names = sorted(p.name for p in personal.iterdir())
        if client is not None and (personal / folder_name(client)).is_dir():
            return personal / folder_name(client)
        if client is None:
            raise UserError(
                f"each client of {run} has a result of its own: name one with --client ({', '.join(names[:8])})"
            )
        raise UserError(f"no client {client!r} in {run}: {suggest(client, names)}")
    if client is not None and (run / "adapter").is_dir():
        raise UserError(f"{run} has one result for all clients: leave --client out")
    raise UserError(f"{run} has no result yet: finish it with `fedloom run {run} --resume`")


def export_run(run: Path, format: str, out: Path, client: str | None, dtype: str | None = None) -> Path:
    """Write the result of `run` into the new folder `out` and return it.

    Args:
        dtype: of a GGUF file's matrices; None is f16. The other formats keep the run's own.

    Raises:
        UserError: there is no such result, or it cannot be written in this format.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}: {suggest(format, FORMATS)}")
    if dtype is not None and format != "gguf":
        raise UserError(f"--dtype={dtype} works only with --format gguf; {format} keeps the run's dtype: leave it out")
    source = result_folder(run, client)
    if format == "peft" and not (source / "adapter_config.json").is_file():
        raise UserError(
            f"{run} trained the whole model (adapter.method=full), so it has no adapter: use --format merged"
        )
    if out.exists():
        raise UserError(f"{out} exists already: name another folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))  # the folder appears whole or not at all
    try:
        scratch.chmod(0o755)
        recipe = RunFolder(run).stored_recipe()
        if format == "peft":
            for file in source.iterdir():
                shutil.copyfile(file, scratch / file.name)
        elif format == "merged":
            from fedloom.models.saved import export_merged

            log.info("merging the adapter into the base model's weights")
            export_merged(recipe.model, source, scratch)
        else:
            _write_gguf(recipe, source, scratch, dtype or DTYPE)
        write_card(scratch, recipe, read_summary(RunFolder(run)), client)
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _write_gguf(recipe: Recipe, source: Path, folder: Path, dtype: str) -> None:
    from fedloom.models.gguf.model import DTYPES
    from fedloom.models.saved import export_gguf

    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is not known: {suggest(dtype, DTYPES)}")
    log.info(f"merging the adapter into the base model's weights, as {dtype}")
    name = folder_name(recipe.name or "run")
    export_gguf(recipe.model, source, folder / f"{name}-{dtype.upper()}.gguf", dtype, name)
