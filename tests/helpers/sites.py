"""Sites in this process: real agents, policies and audit logs, with a trainer that is a function instead of a process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from fedloom.experiment.run import Result, run
from fedloom.experiment.site_data import Sites as SiteData
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.ranks.worker import Worker, WorkerLost
from fedloom.runtimes.sites.agent import Agent
from fedloom.runtimes.sites.exchange import Patience
from fedloom.runtimes.sites.link import Answer
from fedloom.runtimes.sites.policy import Audit, Policy
from fedloom.runtimes.sites.project import SiteConfig
from fedloom.runtimes.sites.runtime import Distributed
from fedloom.runtimes.sites.trainer import Room

#: Short enough for a test, long enough for a slow machine.
BRISK = Patience(answer=10.0, silence=1.0, poll=0.2, start=5.0)


class Inline:
    """A trainer without a process."""

    def __init__(self, answer: Callable[..., tuple[dict[str, Any], bytes]]) -> None:
        self._answer = answer
        self.alive = True

    def ask(self, header, body, deadline=None, stopped=lambda: False):
        assert self.alive
        try:
            return self._answer(header["kind"], body, deadline, stopped)
        except Exception:
            self.alive = False
            raise

    def close(self) -> None:
        self.alive = False


class Sites:
    """A `Link` to agents in this process. `silent` holds the sites that give no answer."""

    def __init__(self, folder: Path, trainers: Mapping[str, Callable[..., Any]], policy: Policy | None = None) -> None:
        self.folder = folder
        self.silent: set[str] = set()
        self.log: list[tuple[str, str]] = []
        self._policy = policy or Policy.model_validate({})
        self._trainers = trainers
        self.agents = {site: self.agent(site) for site in trainers}

    def agent(self, site: str, start: Callable[[Mapping[str, Any]], Any] | None = None) -> Agent:
        audit = Audit(self.folder / site / "audit.jsonl")
        own = start or (lambda recipe: Inline(self._trainers[site]))
        return Agent(own, self._policy, audit)

    def ask(self, site: str, header: Mapping[str, Any], data: bytes, timeout: float) -> Answer | None:
        self.log.append((site, str(header["verb"])))
        if site in self.silent or site not in self.agents:
            return None
        return self.agents[site].answer(header, data)

    def close(self) -> None:
        for agent in self.agents.values():
            agent.close()


#: What a site's trainer hands to its agent: (client, what was asked, the message) → the message that leaves.
Alter = Callable[[str, bytes, bytes], bytes]


def between_sites(
    recipe: Recipe,
    files: Mapping[str, Path],
    folder: Path,
    alter: Alter = lambda client, asked, message: message,
    processes: Mapping[str, Callable[[Mapping[str, Any]], Worker]] | None = None,
) -> Result:
    """A run whose clients are sites, each with its own trainer's code, data and state; no engine.

    Args:
        processes: clients whose trainer is a process, or several, and what starts it for a recipe.
    """
    policy, turn = Policy.model_validate({}), Lock()  # trainers are processes; threads would share transformers' state

    def trainer(client: str, path: Path) -> Callable[..., tuple[dict[str, Any], bytes]]:
        room = Room(SiteConfig(client=client, home=str(folder / client), policy="none", data=str(path)), policy)

        def answer(kind, body, deadline=None, stopped=lambda: False):
            with turn:
                header, message = room.answer(kind, body)
            return header, alter(client, body, message) if kind == "work" else message

        return answer

    link = Sites(folder, {client: trainer(client, path) for client, path in files.items()})
    for client, start in (processes or {}).items():
        link.agents[client].close()
        link.agents[client] = link.agent(client, start)
    runtime = Distributed(link, {c: c for c in files}, list(files), Patience(poll=0.5))
    try:
        distributed = recipe.with_values({"runtime.name": "distributed"})
        return run(distributed, folder / "run", source=SiteData(runtime, folder / "run", False))
    finally:
        link.close()


def killed(*_: Any) -> Any:
    raise WorkerLost("SIGKILL")
