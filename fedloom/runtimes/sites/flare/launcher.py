"""Start a site's job process, and start it again if a signal killed it: then one update is lost, and not the job.

The launcher belongs to the site (its local/resources.json names it). It uses two functions that are not quite public in
the engine, `spawn_process` and `get_credential_env`. Only this file uses them, and a test checks that they exist.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.job_launcher_spec import JobHandleSpec
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.utils.job_launcher_utils import get_credential_env
from nvflare.utils.process_utils import spawn_process

#: A process that dies again within this many seconds of its start is not started a third time.
TOO_SOON = 5.0


#: A job's folder in a kit.
JOB = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def clear_jobs(kit: Path, but: str = "") -> None:
    """Delete the folder that the engine leaves of each job, except `but`. A site runs one job at a time."""
    for folder in kit.iterdir():
        if folder.is_dir() and JOB.fullmatch(folder.name) and folder.name != but:
            shutil.rmtree(folder, ignore_errors=True)


class RestartingLauncher(ClientProcessJobLauncher):
    def launch_job(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> JobHandleSpec:
        clear_jobs(
            Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_root_dir()), job_meta[JobMetaKey.JOB_ID.value]
        )
        handle: Any = super().launch_job(job_meta, fl_ctx)
        argv = shlex.split(self.get_command(job_meta, fl_ctx), True)
        environment = os.environ | get_credential_env(fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS) or {})
        return _Restarted(handle, argv, environment)


class _Restarted(JobHandleSpec):
    """A job's process, and those that replace it after a signal."""

    def __init__(self, handle: Any, argv: list[str], environment: dict[str, str]) -> None:
        super().__init__()
        self._handle = handle
        self._argv = argv
        self._environment = environment
        self._stopped = False

    def terminate(self, **how: Any) -> None:
        self._stopped = True
        self._handle.terminate()

    def poll(self) -> Any:
        return self._handle.poll()

    def wait(self) -> None:
        """Wait until the process ends without a signal, or is stopped."""
        while True:
            began = time.monotonic()
            self._handle.wait()
            code = self._handle.adapter.poll()
            killed = code is not None and (code < 0 or code == 137)
            if self._stopped or not killed or time.monotonic() - began < TOO_SOON:
                return
            self._handle.adapter = spawn_process(self._argv, self._environment)
