"""The contract between the round loop and a runtime, which is where clients run.

    experiment ── open ──▶ runtime ◀── run ── dispatcher        runtime.close at the end of the run

A runtime is one class, named in the registry under `runtime.name`. What it can do it declares in `capabilities`, so that a
recipe that asks for more is refused before any work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedloom.data.federated import FederatedData
from fedloom.messages.types import Assignment, Outcome
from fedloom.recipe.recipe import Recipe

if TYPE_CHECKING:
    from fedloom.federation.client import Client
    from fedloom.federation.watch import Watch


@dataclass(frozen=True)
class Capabilities:
    """What a runtime can do.

    Attributes:
        virtual: time is simulated. Work is done as soon as it is sent, and `VirtualTime` says when its outcome arrives.
        pooled_tests: a client can be measured on the test data of all clients together. No site has another's data.
        cohorts: several clients can train in one pass over the base model (train.cohort).
        ranks: a client can be several processes (runtime.ranks).
        keeps_clients: a client stays in one process for the whole run, and keeps what it was sent once (offsite tuning).
        conducts: the server of a run is another process too: `conduct` runs a whole recipe, and `open` is not called.
    """

    virtual: bool = False
    pooled_tests: bool = False
    cohorts: bool = False
    ranks: bool = False
    keeps_clients: bool = True
    conducts: bool = False


class Runtime(ABC):
    """Where clients run. Subclass it and name the class in the registry.

    Attributes:
        capabilities: what recipes are checked against.
    """

    capabilities: ClassVar[Capabilities] = Capabilities()

    @classmethod
    def open(cls, recipe: Recipe, data: FederatedData, folder: Path, client: Callable[[], Client]) -> Runtime:
        """Start the runtime with its clients.

        Args:
            recipe: resolved.
            data: the data of all clients.
            folder: the run's folder.
            client: makes the client of this process. A runtime with processes of its own does not call it.

        Raises:
            UserError: this machine cannot carry what the recipe asks for.
        """
        raise NotImplementedError(f"{cls.__name__} is not opened by name")

    @classmethod
    def conduct(cls, recipe: Recipe, out: Path, resume: bool, overwrite: bool, watch: Watch) -> Any:
        """Run a whole recipe in other processes. Arguments and result are those of `experiment.run`.

        Called only where `capabilities.conducts`.
        """
        raise NotImplementedError(f"{cls.__name__} has no processes that conduct a run")

    @property
    @abstractmethod
    def clients(self) -> tuple[str, ...]:
        """All clients, in a fixed order."""

    @abstractmethod
    def run(self, assignments: Iterable[Assignment | None]) -> Iterator[Outcome]:
        """Carry the assignments to their clients, and yield one outcome for each as it arrives.

        `assignments` is pulled only while the caller waits for an outcome. None in it means that there is nothing more to
        send before the next outcome was handed over: the runtime waits for one and pulls again afterwards. With no work
        under way it ends. The next round changes the tensors of an assignment, so the runtime encodes them when it pulls.
        Another `run` (an evaluation) may begin and end while this one is not waited for.
        """

    @abstractmethod
    def close(self) -> None:
        """End processes and free memory. A second call does nothing."""
