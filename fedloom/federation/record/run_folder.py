"""A run's folder: who may write into it, what is in it, and how an interrupted run is found again.

One process at a time holds a folder (a file lock that ends with the process, however it ends). This file does not
know what a run does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from fedloom.common.errors import UserError
from fedloom.common.files import is_unfinished, lock_file, write_bytes, write_json
from fedloom.common.yaml import load_yaml
from fedloom.federation.record.checkpoints import Checkpoints
from fedloom.recipe.library import find_recipe
from fedloom.recipe.recipe import Recipe

#: What a run writes, and all that `--overwrite` deletes.
CONTENTS = (
    "events.jsonl", "summary.json", "split.json", "answers.json", "report.html",
    "evaluations", "checkpoints", "clients", "adapter", "adapters", "trackers", "reference",
    "ranks.log",
    "recipe.yaml",  # last: what is deleted by half can still be overwritten
)  # fmt: skip


#: What may lie in a folder before a run begins there: the lock, and a federation's certificates and orders.
OTHERS = {".lock", "federation"}


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def holds_a_run(self) -> bool:
        return (self.path / "recipe.yaml").is_file()

    def stored_recipe(self) -> Recipe:
        """The resolved recipe of the run that lies here. Raises UserError where it cannot be read."""
        try:
            return Recipe.parse(load_yaml((self.path / "recipe.yaml").read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path / 'recipe.yaml'} cannot be read ({type(error).__name__}): the run is lost"
            ) from None

    def write_recipe(self, recipe: Recipe) -> None:
        write_bytes(self.path / "recipe.yaml", recipe.to_yaml().encode())

    def write(self, name: str, values: Mapping[str, Any], rows: str | None = None) -> None:
        """A JSON file of the run; the list under the key `rows` has a line for each item."""
        write_json(self.path / name, values, rows)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run, None where it is not there or cannot be read."""
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return values if isinstance(values, dict) else None

    def sweep(self) -> None:
        """Remove what a killed process had begun to write and not yet renamed."""
        for path in [*self.path.rglob(".*.tmp"), *(self.path / "checkpoints").glob(".*")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        for name in CONTENTS:
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)


@contextmanager
def opened(path: Path, *, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """Hold a run's folder for the length of a block.

    Raises:
        UserError: the folder is in use, holds a run that is neither resumed nor overwritten, holds something else, or
            has nothing to resume.
        OSError: the folder cannot be written.
    """
    folder = RunFolder(path)
    if resume and not folder.holds_a_run:
        raise UserError(
            f"there is no run to resume in {path}: start it without --resume, or name its folder with --out"
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: name a folder with --out")
    if (
        not folder.holds_a_run
        and path.is_dir()
        and any(p.name not in OTHERS and not is_unfinished(p) for p in path.iterdir())
    ):
        raise UserError(f"{path} is not empty and holds no run: name another folder with --out")
    made = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    lock = lock_file(path / ".lock")
    if lock is None:
        raise UserError(f"run folder {path} is in use by another process: wait for it, or use another --out")
    with lock:
        if folder.holds_a_run and not (resume or overwrite):
            raise UserError(
                f"run folder {path} already holds a run: continue it with --resume, replace it with --overwrite, "
                "or name another folder with --out"
            )
        folder.sweep()
        try:
            yield folder
        finally:
            if [p.name for p in path.iterdir()] == [".lock"]:  # refused before anything was written
                (path / ".lock").unlink()
                for empty in made:
                    empty.rmdir()


def recipe_and_folder(name: str, values: Mapping[str, Any], out: Path | None, resume: bool) -> tuple[Recipe, Path]:
    """What a command line asks for: a recipe with `values` in it, and its run's folder.

    A run that is resumed has its recipe in the folder, with what was settled as it began: of `name` only `values` count.
    """
    source = find_recipe(name)
    folder = out or (source.parent if resume and source == Path(name) / "recipe.yaml" else None)
    chosen = Recipe.load(source, values)
    folder = folder or Path("runs") / chosen.name
    if resume and RunFolder(folder).holds_a_run:
        chosen = RunFolder(folder).stored_recipe().with_values(values)
    return chosen, folder


#: What may differ between a run and its continuation; everything else would make it another run.
#: What is asked and how it is marked stays: a score after other questions than those before would say nothing. Which kernel
#: attends is the machine's affair, as its device is.
CHANGEABLE = (
    "federation.rounds", "evaluation.every", "evaluation.batch_size", "tracking.", "runtime.", "model.attention", "name",
    "description",
)  # fmt: skip


#: Values that are filled in as a run begins: of these the stored ones stay.
OPEN = (None, "auto", "by device")


def continued(stored: Recipe, given: Recipe) -> Recipe:
    """The stored recipe with what `given` may change. Raises UserError for anything else that differs.

    Open values of `given` (null, auto) leave the stored ones, which a probe or a corpus's default had filled in.
    """
    before, now = _flat(stored.resolved()), _flat(given.resolved())
    changes = {k: v for k, v in now.items() if v != before.get(k)}
    for key, value in changes.items():
        if key.startswith(CHANGEABLE) or value in OPEN:
            continue
        raise UserError(
            f"{key} is {before.get(key)!r} in the run and cannot become {value!r} when it is resumed: "
            "start another run with --out"
        )
    return stored.with_values({k: v for k, v in changes.items() if k.startswith(CHANGEABLE) and v not in OPEN})


def resumed(folder: RunFolder, given: Recipe) -> Recipe:
    """Return the recipe of the resumed run in `folder`. Raises UserError for a change that is not possible."""
    recipe = continued(folder.stored_recipe(), given)
    finished = max(Checkpoints(folder / "checkpoints").rounds(), default=0)
    if finished > recipe.federation.rounds:
        raise UserError(
            f"federation.rounds={recipe.federation.rounds} but {finished} rounds are finished: ask for more, not fewer"
        )
    return recipe


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key != "columns":
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
