"""Requests and answers as messages of the engine's cells: the only channel between a server's and a site's job.

The engine carries them, with its certificates and tokens, and does not parse them. A request is one run of bytes; an
answer is a text and bytes. The engine's auxiliary messages use the same cells, but are not used here: their end at the
site formats the whole message for a log line, even if nothing logs it. For 10 MB that takes a sixth of a second.

    request    header length, uint32 LE | header, JSON | data
    answer     {"header": JSON, "data": bytes}      the engine would keep a reply of bytes alone for a minute

A site's job answers only the server of its own run. This file does not know what is requested.
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


#: With this header, the engine sends a message's buffers one after another, without a copy.
AS_IT_IS = {StreamHeaderKey.PAYLOAD_ENCODING: Encoding.BYTES}


class FlareLink:
    """The server's end, inside its job.

    Args:
        engine: the engine of the server's job.
        job: the engine's id of the job.
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
    """Encode the part of a request in front of its data."""
    text = json.dumps(header, allow_nan=False).encode()
    return struct.pack("<I", len(text)) + text


def _question(payload: object) -> Answer | None:
    """Decode a request, with a view of its data; None for bytes that are not a request."""
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
    """Decode an answer; None if it is not valid, which counts as no answer."""
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
    """Begin to answer the server's requests, inside the site's job."""
    engine.get_cell().register_request_cb(
        channel=CHANNEL, topic=TOPIC, cb=handler(answer, FQCN.join([FQCN.ROOT_SERVER, job]))
    )


def handler(answer: Callable[[Mapping[str, Any], Bytes], Answer], server: str) -> Callable[[Message], Message]:
    """Return the function that the engine calls with a message. `server`: the engine's name of the only accepted sender."""

    def handle(request: Message) -> Message:
        if request.get_header(MessageHeaderKey.ORIGIN) != server:
            log.warning("rejected a request that did not come from this run's server")
            return make_reply(ReturnCode.AUTHENTICATION_ERROR)
        asked = _question(request.payload)
        if asked is None:
            return make_reply(ReturnCode.INVALID_REQUEST)
        try:
            given = answer(asked.header, asked.data)
        except Exception:  # the engine would send the error's text; it stays in the site's log
            log.exception("no answer")
            return make_reply(ReturnCode.PROCESS_EXCEPTION)
        return make_reply(
            ReturnCode.OK, body={"header": json.dumps(given.header, allow_nan=False), "data": bytes(given.data)}
        )

    return handle
