"""A site's job: the engine starts it in its own process; it answers the server's requests through the site's agent.

The site's own file (`FEDLOOM_SITE` names it) has the paths of its data, policy and state; none of them comes from the
job. This file does not know what the trainer does.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedloom.runtimes.ranks.worker import Worker, command, end_with_parent
from fedloom.runtimes.sites import agent
from fedloom.runtimes.sites.agent import Agent
from fedloom.runtimes.sites.flare.link import attend
from fedloom.runtimes.sites.policy import Audit, Policy
from fedloom.runtimes.sites.project import SiteConfig, load_section


class AgentLog(logging.Handler):
    """Writes the agent's log lines to a file of the site. A full disk does not stop the agent."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(record.getMessage() + "\n")


class SiteExecutor(Executor):
    """Registers the agent when the job begins and closes it when the job ends."""

    def __init__(self) -> None:
        super().__init__()
        self._agent: Agent | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            end_with_parent()
            self._agent = open_agent(load_section(SiteConfig, Path(os.environ["FEDLOOM_SITE"]), "the site's file"))
            attend(fl_ctx.get_engine(), fl_ctx.get_job_id(), self._agent.answer)
        elif event_type in {EventType.END_RUN, EventType.ABORT_TASK} and self._agent is not None:
            self._agent.close()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Reject the engine's own tasks: fedloom has none."""
        return make_reply(ReturnCode.TASK_UNKNOWN)


def open_agent(site: SiteConfig) -> Agent:
    home, policy = Path(site.home), Policy.load(Path(site.policy))
    home.mkdir(parents=True, exist_ok=True)

    def start(recipe: Mapping[str, Any]) -> Worker:
        ranks = site.ranks or policy.ranks_of(recipe)  # the policy does not limit the site's own setting
        return Worker(command(), home / "trainer.log", policy.max_message_bytes, ranks)

    said = logging.getLogger(agent.__name__)
    said.addHandler(AgentLog(home / "agent.log"))
    said.setLevel(logging.INFO)
    return Agent(start, policy, Audit(home / "audit.jsonl"))
