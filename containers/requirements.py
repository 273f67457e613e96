"""Prints what pyproject.toml asks for, with the named extras, one requirement a line: `python3 requirements.py [EXTRA …]`.

The word `build` among the extras stands for what builds fedloom's own wheel. Runs before anything is installed, so it
needs the standard library only. It does not know versions; constraints.txt does.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(extras: list[str], project: Path = PROJECT) -> list[str]:
    """fedloom's own requirements and those of `extras`, an extra of extras taken apart. Raises SystemExit."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))
    declared = table["project"]
    known = {**declared["optional-dependencies"], "build": table["build-system"]["requires"]}
    found, waiting = list(declared["dependencies"]), list(extras)
    while waiting:
        extra = waiting.pop(0)
        if extra not in known:
            sys.exit(f"requirements.py: there is no extra {extra!r}: take one of {', '.join(known)}")
        for wanted in known[extra]:
            inner = re.fullmatch(rf"{declared['name']}\[([\w,-]+)\]", wanted)
            waiting += inner[1].split(",") if inner else []
            found += [] if inner else [wanted]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
