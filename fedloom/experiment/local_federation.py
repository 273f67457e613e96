"""`runtime.name=distributed` under `fedloom run`: a federation with server and all sites on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom.common.extras import needing_extras
from fedloom.federation.watch import Watch
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.sites.runtime import Distributed


class LocalFederation(Distributed):
    """The runtime between organisations, with its server and sites as children of this process (local_sites.py)."""

    capabilities = replace(Distributed.capabilities, conducts=True)

    @classmethod
    def conduct(cls, recipe: Recipe, out: Path, resume: bool, overwrite: bool, watch: Watch) -> Any:
        """Run the recipe. Raises UserError and RunFailed as `experiment.sites.serve` does."""
        with needing_extras():
            from fedloom.experiment.local_sites import run_here
        return run_here(recipe, out, resume, overwrite, watch)
