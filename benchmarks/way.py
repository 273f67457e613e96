"""How much code one plain FedAvg round runs through: the files and functions of fedloom between its two events.

    python benchmarks/way.py            half a minute
    python benchmarks/way.py --list     each file, in the order in which the round enters it, with its calls and functions

A run of three clients and two rounds in the simulator, with the recipe's defaults: no hook, no operator, no privacy. The
model has random weights and the rows are written here, so nothing is downloaded. `sys.setprofile` watches the second round
from its beginning, before clients are sampled, to its checkpoint. In the first round things are decided that hold for the
whole run.

    files=        files of fedloom/ in which a function ran; at most 25
    functions=    different functions that ran
    generators=   nested generators between an update and the algorithm that aggregates it, the runtime's reply included;
                  at most 4

The exit code is 1 where files= or generators= is over its limit.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from worded import worded_rows

import fedloom
from fedloom import Recipe
from fedloom.experiment.assemble import assemble
from fedloom.experiment.prepare import prepare
from fedloom.federation.client import Client
from fedloom.federation.coordinator import Coordinator
from fedloom.federation.record.run_folder import opened
from fedloom.federation.watch import Watch
from fedloom.messages.types import Assignment, Outcome
from fedloom.models.random_model import build_model

FILES, GENERATORS = 25, 4

ROOT = Path(fedloom.__file__).parent


@dataclass
class Way:
    """What one round ran through.

    Attributes:
        files: path under fedloom/ → its calls, in the order in which the round entered them.
        functions: (file, qualified name) → calls.
        generators: the names of the nested generators that an update passed, from the algorithm outwards.
    """

    files: Counter[str] = field(default_factory=Counter)
    functions: Counter[tuple[str, str]] = field(default_factory=Counter)
    generators: tuple[str, ...] = ()

    def profile(self, frame: FrameType, event: str, argument: Any) -> None:
        """For `sys.setprofile`."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)) and not code.co_name.startswith("<"):
            name = Path(code.co_filename).relative_to(ROOT).as_posix()
            self.files[name] += 1
            self.functions[name, code.co_qualname] += 1


def recipe_for(scratch: Path) -> Recipe:
    """Plain FedAvg of three clients, all else as a recipe has it by default."""
    rows = worded_rows(scratch / "rows.jsonl", 60, (3, 9))
    return Recipe.parse(
        {
            "model": str(build_model(scratch / "model")),
            "data": {"path": str(rows), "max_length": 96},
            "split": {"splitter": "uniform", "num_clients": 3},
            "algorithm": "fedavg",
            "federation": {"rounds": 2},
            "train": {"steps": 2, "batch_size": 4},
            "evaluation": {"suite": None, "answers": 0, "every": 0},
            "runtime": {"device": "cpu"},
        }
    )


def nested_generators(stop: str) -> tuple[str, ...]:
    """The generators of fedloom on the stack, from the function named `stop` down to the caller."""
    frame: FrameType | None = sys._getframe(1)
    found: list[str] = []
    while frame is not None and frame.f_code.co_name != stop:
        code = frame.f_code
        if code.co_flags & inspect.CO_GENERATOR and code.co_filename.startswith(str(ROOT)):
            found.append(code.co_qualname)
        frame = frame.f_back
    return tuple(reversed(found))


@contextmanager
def noting_generators(way: Way) -> Iterator[None]:
    """In this block `way.generators` are those that stand between a client's reply and the algorithm's `aggregate`."""
    plain = Client.handle

    def handle(self: Client, assignment: Assignment) -> Outcome:
        if assignment.kind == "train":
            way.generators = nested_generators("aggregate")
        return plain(self, assignment)

    Client.handle = handle  # type: ignore[method-assign]
    try:
        yield
    finally:
        Client.handle = plain  # type: ignore[method-assign]


def walked(recipe: Recipe, folder: Path) -> Way:
    """The way of the last round of `recipe`."""
    way, watch, plain = Way(), Watch(), Coordinator.round

    def round(self: Coordinator, number: int) -> None:
        sys.setprofile(way.profile if number == recipe.federation.rounds else None)
        try:
            plain(self, number)
        finally:
            sys.setprofile(None)

    Coordinator.round = round  # type: ignore[method-assign]
    try:
        with noting_generators(way), opened(folder, resume=False, overwrite=False) as out:
            coordinator = assemble(prepare(recipe, watch), out, resume=False, watch=watch)
            coordinator.run()
            coordinator.close()
    finally:
        Coordinator.round = plain  # type: ignore[method-assign]
    return way


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name each file, with its calls and functions")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        way = walked(recipe_for(Path(scratch)), Path(scratch) / "run")
    if chosen.list:
        for name, calls in way.files.items():
            functions = [function for file, function in way.functions if file == name]
            print(f"{name:40} calls {calls:6}  functions {len(functions):3}  {', '.join(functions)}")
        print("generators:", " < ".join(way.generators))
    print(f"files={len(way.files)}")
    print(f"functions={len(way.functions)}")
    print(f"generators={len(way.generators)}")
    return int(len(way.files) > FILES or len(way.generators) > GENERATORS)


if __name__ == "__main__":
    sys.exit(main())
