"""pip's configuration of this machine, as a file for a build: `python3 pip_conf.py FOLDER` writes FOLDER/pip.conf.

Where wheels come from is the machine's affair and stands in no Dockerfile. pip says itself what is in force (files and
environment); that goes into the build as a secret, which no layer keeps. Printed are the folders and files of this
machine that the configuration names, one a line: the build has to see them at the same place. A certificate file is
copied to FOLDER/ca.crt, and pip.conf names it by the place that the Dockerfile gives it.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Where the Dockerfile mounts the certificates.
CERTIFICATES = "/run/handed/ca.crt"

#: Keys that say where packages come from and how they are reached; whatever else pip is told here stays here.
HANDED = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy", "cert", "constraint",
          "timeout", "default-timeout", "retries")  # fmt: skip


def in_force(listing: Iterable[str]) -> dict[str, str]:
    """Key → value of `pip config list`: of several sections the environment's counts most, then install, then global."""
    ranked: dict[str, tuple[int, str]] = {}
    for line in listing:
        match = re.fullmatch(r"(global|install|download|wheel|:env:)\.([\w-]+)=(.*)", line.strip())
        if match is None or match[2] not in HANDED:
            continue
        rank = {"global": 0, ":env:": 2}.get(match[1], 1)
        if rank >= ranked.get(match[2], (-1, ""))[0]:
            ranked[match[2]] = rank, str(ast.literal_eval(match[3]))
    return {key: value for key, (_, value) in ranked.items()}


def places(settings: dict[str, str]) -> list[str]:
    """The folders and files of this machine that the settings name, each once; not the certificates.

    Of an index in a folder it is the folder above: the pages of an index link to files that lie beside it.
    """
    found = []
    for key in ("index-url", "extra-index-url", "find-links", "constraint"):
        for word in settings.get(key, "").split():
            if word.startswith("file:") or "://" not in word:
                path = Path(unquote(urlsplit(word).path) if word.startswith("file:") else word).expanduser()
                found.append(str(path.parent if key.endswith("index-url") else path))
    return list(dict.fromkeys(found))


def written(settings: dict[str, str]) -> str:
    """pip.conf; a value of several words gets a line for each, as pip reads them."""
    values = {**settings, "cert": CERTIFICATES} if "cert" in settings else settings
    return "[global]\n" + "".join(f"{key} = " + "\n    ".join(value.split()) + "\n" for key, value in values.items())


def main(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    settings = in_force(done.stdout.splitlines()) if done.returncode == 0 else {}
    missing = [place for place in places(settings) if not Path(place).exists()]
    if missing:
        sys.exit(f"pip_conf.py: pip's configuration names {missing[0]}, which does not exist: see pip config debug")
    os.umask(0o077)
    if "cert" in settings:
        shutil.copyfile(Path(settings["cert"]).expanduser(), folder / "ca.crt")
    (folder / "pip.conf").write_text(written(settings), encoding="utf-8")
    print("\n".join(places(settings)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
