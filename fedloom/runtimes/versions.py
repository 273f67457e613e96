"""Compare the versions of two sides of a federation.

The version of fedloom must be equal, because both sides read each other's messages. For the libraries that compute, the
first two numbers must be equal. This file does not know how the versions travel.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedloom.common import environment

#: Compared by the first two numbers of their versions; fedloom's whole version is compared.
COMPARED = ("torch", "transformers", "peft", "safetensors")


def own() -> dict[str, str]:
    """Return the versions of this side, for its greeting."""
    found = environment.versions()
    return {name: found[name] for name in ("fedloom", *COMPARED) if name in found}


def mismatch(here: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    """Say what differs, as the end of a sentence; None if the two sides can work together.

    >>> mismatch({"fedloom": "0.1.0"}, {"fedloom": "0.2.0"})
    'fedloom is 0.1.0 here and 0.2.0 there'
    """
    for name in ("fedloom", *COMPARED):
        mine, theirs = here.get(name, "missing"), there.get(name, "missing")
        if (mine if name == "fedloom" else _release(mine)) != (theirs if name == "fedloom" else _release(theirs)):
            return f"{name} is {mine} here and {theirs} there"
    return None


def _release(version: str) -> str:
    """Return the first two numbers: 2.13.0+cpu → 2.13."""
    return ".".join(version.partition("+")[0].split(".")[:2])
