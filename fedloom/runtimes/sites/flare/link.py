"""Our questions and answers as messages of the engine's cells: the one channel between a server's and a site's job.

The engine carries them, with its certificates and tokens, and takes nothing apart: a question is one run of bytes, an
answer a text and bytes. They do not go by the engine's auxiliary messages, which are made of the same cells: its site's end
writes whatever came into a line for its log, also where no log wants that line, and 10 MB take a sixth of a second there.

    question   header length, uint32 LE | header, JSON | data      a reply's bytes, in contrast, would stay with the engine
    answer     {"header": JSON, "data": bytes}                     for a minute if they were bytes alone

A site's job answers its own run's server and nobody else. This file does not know what is asked.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable, Mapping
from typing import Any

from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.defs import Encoding, MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey

from fedloom.common.errors import RunFailed
from fedloom.runtimes.sites.link import PIECE, Answer, Bytes

log = logging.getLogger(__name__)


CHANNEL = "fedloom"


TOPIC = "ask"


MAX_HEADER = 1 << 16


#: The engine sends the buffers of such a message one after another, without another copy.
AS_IT_IS = {StreamHeaderKey.PAYLOAD_ENCODING: Encoding.BYTES}


class FlareLink:
    """The server's end, inside its job.

    Args:
        engine: of the server's job.
        job: the engine's number of it.
    """

    def __init__(self, engine: Any, job: str, abort: Signal) -> None:
        self._engine = engine
        self._job = job
        self._abort = abort

    def ask(self, site: str, header: Mapping[str, Any], data: Bytes, timeout: float) -> Answer | None:
        if self._abort.triggered:
            raise RunFailed("the run was stopped from outside")
        client = self._engine.get_client_from_name(site)
        if client is None:
            return None
        reply = self._engine.get_cell().send_request(
            channel=CHANNEL, topic=TOPIC, target=FQCN.join([client.get_fqcn(), self._job]), timeout=timeout,
            request=Message(dict(AS_IT_IS), [start(header), data]), optional=True, abort_signal=self._abort,
        )  # fmt: skip
        if reply.get_header(MessageHeaderKey.RETURN_CODE) != ReturnCode.OK or not isinstance(reply.payload, dict):
            return None
        return _answer(reply.payload.get("header"), reply.payload.get("data"))


def start(header: Mapping[str, Any]) -> bytes:
    """What a question's data stands behind."""
    text = json.dumps(header, allow_nan=False).encode()
    return struct.pack("<I", len(text)) + text


def _question(payload: object) -> Answer | None:
    """None for bytes that are no question. Its data is a window into them."""
    if not isinstance(payload, bytes | bytearray | memoryview) or len(payload) < 4:
        return None
    (length,) = struct.unpack("<I", payload[:4])
    if length > min(MAX_HEADER, len(payload) - 4):
        return None
    try:
        text = str(payload[4 : 4 + length], "utf-8")
    except UnicodeDecodeError:
        return None
    return _answer(text, memoryview(payload)[4 + length :])


def _answer(text: object, data: object) -> Answer | None:
    """None for an answer that is none: it counts as silence."""
    if not isinstance(text, str) or len(text) > MAX_HEADER:
        return None
    if not isinstance(data, bytes | bytearray | memoryview) or len(data) > PIECE:
        return None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return Answer(header, data) if isinstance(header, dict) else None


def attend(engine: Any, job: str, answer: Callable[[Mapping[str, Any], Bytes], Answer]) -> None:
    """The site's end, inside its job: from now on its server's questions are answered."""
    engine.get_cell().register_request_cb(
        channel=CHANNEL, topic=TOPIC, cb=handler(answer, FQCN.join([FQCN.ROOT_SERVER, job]))
    )


def handler(answer: Callable[[Mapping[str, Any], Bytes], Answer], server: str) -> Callable[[Message], Message]:
    """What the engine calls with a message. `server`: the engine's name of who may ask."""

    def handle(request: Message) -> Message:
        if request.get_header(MessageHeaderKey.ORIGIN) != server:
            log.warning("a question that did not come from this run's server")
            return make_reply(ReturnCode.AUTHENTICATION_ERROR)
        asked = _question(request.payload)
        if asked is None:
            return make_reply(ReturnCode.INVALID_REQUEST)
        try:
            given = answer(asked.header, asked.data)
        except Exception:  # the engine would send its words; they stay in the site's log, and the server hears nothing
            log.exception("no answer")
            return make_reply(ReturnCode.PROCESS_EXCEPTION)
        return make_reply(
            ReturnCode.OK, body={"header": json.dumps(given.header, allow_nan=False), "data": bytes(given.data)}
        )

    return handle
