"""The round loop, its clients and hooks, and what a run leaves on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloom.common.lazy import lazy

if TYPE_CHECKING:
    from fedloom.federation.hooks.base import Fit as Fit
    from fedloom.federation.hooks.base import Hook as Hook
    from fedloom.federation.hooks.base import HookOptions as HookOptions
    from fedloom.federation.hooks.base import Pass as Pass
    from fedloom.federation.hooks.base import ServerRound as ServerRound
    from fedloom.federation.hooks.base import Step as Step
    from fedloom.federation.watch import Watch as Watch

__all__, __getattr__, __dir__ = lazy(
    __name__,
    {
        "Fit": "fedloom.federation.hooks.base",
        "Hook": "fedloom.federation.hooks.base",
        "HookOptions": "fedloom.federation.hooks.base",
        "Pass": "fedloom.federation.hooks.base",
        "ServerRound": "fedloom.federation.hooks.base",
        "Step": "fedloom.federation.hooks.base",
        "Watch": "fedloom.federation.watch",
    },
)
