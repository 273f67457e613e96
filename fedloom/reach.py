"""Whether the Hugging Face hub can be reached, found out in seconds: nothing here waits for a network that is not there."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request

#: Seconds after which a hub that has not answered counts as out of reach.
PATIENCE = 4.0


def switched_off() -> bool:
    """Whether the environment forbids the hub."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in names)


def hub_reachable(patience: float = PATIENCE) -> bool:
    """Whether the hub answers within `patience` seconds. Proxies of the environment are used.

    The question is asked on a thread because looking a name up has no timeout of its own.
    """
    if switched_off():
        return False
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=patience):
                answers.append(True)
        except urllib.error.HTTPError:  # an answer all the same
            answers.append(True)
        except (OSError, ValueError):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return bool(answers and answers[0])
