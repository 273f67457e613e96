"""Our questions and answers as the engine's auxiliary messages: the one channel between a server's and a site's job.

A message is a JSON text and bytes, nothing that the engine would have to take apart. One target for each request, from
a thread of its own: the engine's multicast swallows errors. This file does not know what is asked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedloom.errors import RunFailed
from fedloom.runtimes.link import PIECE, Answer

log = logging.getLogger("fedloom")

TOPIC = "fedloom.ask"
MAX_HEADER = 1 << 16


class FlareLink:
    """The server's end, inside its job."""

    def __init__(self, engine: Any, abort: Signal) -> None:
        self._engine = engine
        self._abort = abort

    def ask(self, site: str, header: Mapping[str, Any], data: bytes, timeout: float) -> Answer | None:
        if self._abort.triggered:
            raise RunFailed("the run was stopped from outside")
        request = Shareable()
        request["header"] = json.dumps(header, allow_nan=False)
        request["data"] = bytes(data)
        with self._engine.new_context() as context:
            replies = self._engine.send_aux_request([site], TOPIC, request, timeout, context, optional=True)
        reply = (replies or {}).get(site)
        if reply is None or reply.get_return_code() != ReturnCode.OK:
            return None
        return _answer(reply)


def _answer(reply: Shareable) -> Answer | None:
    """None for an answer that is none: it counts as silence."""
    text, data = reply.get("header"), reply.get("data")
    if not isinstance(text, str) or len(text) > MAX_HEADER or not isinstance(data, bytes) or len(data) > PIECE:
        return None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return Answer(header, data) if isinstance(header, dict) else None


def handler(answer: Callable[[Mapping[str, Any], bytes], Answer]) -> Callable[..., Shareable]:
    """The site's end: what the engine calls with a request."""

    def handle(topic: str, request: Shareable, fl_ctx: Any) -> Shareable:
        asked = _answer(request)
        if asked is None:
            return make_reply(ReturnCode.BAD_REQUEST_DATA)
        try:
            given = answer(asked.header, asked.data)
        except Exception:  # the engine would send its words; they stay in the site's log, and the server hears nothing
            log.exception("no answer")
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        reply = make_reply(ReturnCode.OK)
        reply["header"] = json.dumps(given.header, allow_nan=False)
        reply["data"] = bytes(given.data)
        return reply

    return handle
