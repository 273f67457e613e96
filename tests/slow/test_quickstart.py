"""The main promise, with the real model: quickstart learns, in time, over enough questions."""

from __future__ import annotations

import json
import time

import pytest

from fedloom.federation.record.events import read_events

pytest.importorskip("reasoning_gym")
pytestmark = [pytest.mark.slow, pytest.mark.network]


def test_quickstart_learns(cli, smollm2, tmp_path):
    started = time.monotonic()
    done = cli("run", "quickstart", "--out", "quickstart")
    seconds = time.monotonic() - started
    assert done.code == 0, done.err
    print(done.out)
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    score, loss = summary["score"], summary["loss"]
    print(f"score {score['before']:.3f} → {score['after']:.3f} of {score['questions']}, loss {loss}, {seconds:.0f} s")
    assert score["questions"] >= 120
    assert score["after"] - score["before"] >= 0.22
    assert loss["after"] < loss["before"]
    assert (tmp_path / "quickstart" / "report.html").stat().st_size > 10_000
    assert seconds < 600
    # Every client is served better than before, by its loss.
    for name, client in summary["per_client"].items():
        assert client["loss"]["after"] < client["loss"]["before"], name
    assert [e for e in read_events(tmp_path / "quickstart" / "events.jsonl") if e["event"] == "client_failed"] == []
