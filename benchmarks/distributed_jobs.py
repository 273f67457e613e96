"""What runs inside the engine's processes for benchmarks/distributed.py; it is started by that and by nobody else.

    Measured      the server's job: echoes by our runtime and by the engine alone, in turn
    PlainSite     a site as it is in life (agent, policy, audit log, trainer as a process), whose trainer takes messages
                  apart, sleeps, and puts what it got into messages again; and the engine alone: it sends back what it gets

The job's orders are `bench.json` of the folder that FEDLOOM_BENCH names; what it found is `found.json` there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedloom.common.files import write_json

import torch  # isort: skip

from fedloom.messages import wire
from fedloom.messages.operators.flat import raw_bytes
from fedloom.messages.types import Assignment, Payload, Update
from fedloom.runtimes.ranks import worker

FOLDER = Path(os.environ.get("FEDLOOM_BENCH", "."))
ECHO = "benchmark.echo"
COUNTS = {"train": 1, "validation": 0, "test": 1, "questions": 0, "tokens": 1}


def tensors(count: int) -> dict[str, torch.Tensor]:
    """`count` bytes of random fp32 in tensors of 16 MB."""
    draw, each = torch.Generator().manual_seed(0), 4 << 20
    sizes = [each] * (count // 4 // each) + [count // 4 % each]
    return {f"layers.{i}.weight": torch.empty(n).uniform_(generator=draw) for i, n in enumerate(sizes) if n}


# ------------------------------------------------------------------ the trainer's process


def sleeper(path: str) -> None:
    seconds = float(os.environ.get("FEDLOOM_BENCH_SLEEP", "0"))
    for connection, header, body in worker.requests(path, 8 << 30):
        if header["kind"] == "prepare":
            worker.send(connection, {"state": "done"}, json.dumps(COUNTS).encode())
            continue
        got = wire.decode_assignment(body)
        del body
        if got.kind == "train":
            time.sleep(seconds)
            metrics = {"loss": 1.0, "skipped_steps": 0}
            payload = Payload() if got.payload.meta.get("keep") else got.payload
        else:
            metrics, payload = {"loss_sum": 1.0, "tokens": 1, "right": 0, "questions": 0}, Payload()
        worker.send(
            connection, {"state": "done"}, wire.encode_outcome(Update(got.client, got.round, payload, 1, 1, metrics))
        )
        del got, payload


if __name__ == "__main__":
    sleeper(sys.argv[1])
    sys.exit()

# ------------------------------------------------------------------ jobs

from nvflare.apis.event_type import EventType  # noqa: E402
from nvflare.apis.fl_constant import ReturnCode  # noqa: E402
from nvflare.apis.shareable import Shareable, make_reply  # noqa: E402

from fedloom.runtimes.sites.agent import Agent  # noqa: E402
from fedloom.runtimes.sites.exchange import Patience  # noqa: E402
from fedloom.runtimes.sites.flare.controller import RunController  # noqa: E402
from fedloom.runtimes.sites.flare.executor import SiteExecutor  # noqa: E402
from fedloom.runtimes.sites.flare.link import FlareLink, attend  # noqa: E402
from fedloom.runtimes.sites.policy import Audit, Policy  # noqa: E402
from fedloom.runtimes.sites.project import SiteConfig, load_section  # noqa: E402
from fedloom.runtimes.sites.runtime import Distributed  # noqa: E402


class PlainSite(SiteExecutor):
    """The real one in all but its trainer's command."""

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        if event_type != EventType.START_RUN:
            super().handle_event(event_type, fl_ctx)
            return
        worker.end_with_parent()
        site = load_section(SiteConfig, Path(os.environ["FEDLOOM_SITE"]), "the site's file")
        home, policy = Path(site.home), Policy.load(Path(site.policy))
        command = [sys.executable, __file__]
        start = lambda recipe: worker.Worker(command, home / "trainer.log", policy.max_message_bytes)  # noqa: E731
        self._agent = Agent(start, policy, Audit(home / "audit.jsonl"))
        attend(fl_ctx.get_engine(), fl_ctx.get_job_id(), self._agent.answer)
        fl_ctx.get_engine().register_aux_message_handler(ECHO, sent_back)


class Measured(RunController):
    """Writes down what `echoes` gives, or what it raised."""

    def conduct(self, link: FlareLink, sites: list[str]) -> None:
        worker.end_with_parent()
        orders = json.loads((FOLDER / "bench.json").read_text(encoding="utf-8"))
        try:
            found = echoes(link, orders)
        except Exception as error:  # the job's own boundary: the benchmark shows it and ends with 1
            found = {"error": f"{type(error).__name__}: {error}"}
        write_json(FOLDER / "found.json", found)


def echoes(link: FlareLink, orders: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each, `times` times in turn, so that both meet the machine in the same mood."""
    sites, times = orders["sites"], orders["times"]
    runtime = Distributed(link, {s: s for s in sites}, sites, Patience(), scratch=FOLDER / "scratch")
    recipe = {
        "algorithm": {"name": "fedavg"},
        "adapter": {"method": "lora"},
        "model": {},
        "federation": {"rounds": times},
    }
    if set(runtime.greet(recipe, "0" * 32)) != set(sites):
        raise RuntimeError("a site did not come up")
    write_json(FOLDER / "idle.json", {})
    time.sleep(orders["idle"])
    payload = Payload(tensors(orders["bytes"]), {"keep": orders["keep"]})
    data = b"" if orders["keep"] else b"".join(bytes(raw_bytes(t)) for t in payload.tensors.values())
    ours, engines = [], []
    for round in range(1, times + 1):
        start = time.perf_counter()
        for outcome in runtime.run(iter([Assignment("train", s, round, times, payload, 1) for s in sites])):
            if not isinstance(outcome, Update) or (data and outcome.payload.tensors.keys() != payload.tensors.keys()):
                raise RuntimeError(f"no echo: {outcome}")
        ours.append(time.perf_counter() - start)
        if data:
            start = time.perf_counter()
            with ThreadPoolExecutor(len(sites)) as pool:
                if not all(pool.map(lambda site: engine_echo(link, site, data), sites)):
                    raise RuntimeError("the engine's echo is not the call")
            engines.append(time.perf_counter() - start)
    runtime.close()
    return {"ours": ours, "engine": engines}


def engine_echo(link: FlareLink, site: str, data: bytes) -> bool:
    """The engine's own way: all bytes in one auxiliary message, and back."""
    request = Shareable()
    request["data"] = data
    engine = link._engine
    with engine.new_context() as context:
        reply = (engine.send_aux_request([site], ECHO, request, 120.0, context, optional=True) or {}).get(site)
    return reply is not None and reply.get_return_code() == ReturnCode.OK and len(reply["data"]) == len(data)


def sent_back(topic: str, request: Shareable, fl_ctx: Any) -> Shareable:
    reply = make_reply(ReturnCode.OK)
    reply["data"] = request["data"]
    return reply
