"""The server's job: the engine starts it in its own process and calls `control_flow`, which does the run.

A subclass in a higher layer (experiment/sites.py) defines the run in `conduct`. The engine's rounds, tasks, persistors
and filters are not used. This file does not know recipes or algorithms.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.signal import Signal

from fedloom.runtimes.sites.flare.link import FlareLink


class RunController(Controller):
    """A job that is one call of `conduct`."""

    @abstractmethod
    def conduct(self, link: FlareLink, sites: list[str]) -> None:
        """Do the run. `sites`: those that the engine has started a job process for."""

    def start_controller(self, fl_ctx: FLContext) -> None:
        pass

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        self.conduct(
            FlareLink(engine, fl_ctx.get_job_id(), abort_signal), sorted(client.name for client in engine.get_clients())
        )

    def stop_controller(self, fl_ctx: FLContext) -> None:
        pass

    def process_result_of_unknown_task(
        self, client: Any, task_name: str, client_task_id: str, result: Any, fl_ctx: FLContext
    ) -> None:
        """Ignore the result: there are no tasks."""
