"""Below quorum a round waits for lost clients until its deadline, and then the run ends with every finished round kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedloom.common.errors import RunFailed
from fedloom.experiment.run import run
from fedloom.federation.record.checkpoints import Checkpoints
from fedloom.federation.record.events import read_events
from fedloom.messages.types import Failure
from fedloom.runtimes.simulator import Simulator

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("loading_once", "no_waiting", "no_reports")]

RECIPE = {"federation.rounds": 3, "federation.min_clients": 3, "evaluation.every": 0}


#: Seconds between two questions; a sum of it is exact in binary.
PAUSE = 0.25


class Clock:
    """Passes while the round sleeps and at no other time, so that no busy machine changes what is seen."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def losing(monkeypatch):
    """`losing(n, reason)`: the first n pieces of work of client `last` in round 2 come to nothing, in a runtime with real time.

    What it returns fills with the moments at which the client was asked.
    """
    clock = Clock()
    play = Simulator.run

    def lose(times: int, reason: str) -> list[float]:
        asked: list[float] = []

        def run_with_losses(self, assignments):
            for assignment in assignments:
                if (assignment.kind, assignment.client, assignment.round) == ("train", "last", 2) and len(
                    asked
                ) < times:
                    asked.append(clock.now)
                    yield Failure("last", 2, reason, "as this test wants it")
                else:
                    yield from play(self, [assignment])

        monkeypatch.setattr(Simulator, "capabilities", replace(Simulator.capabilities, virtual=False))
        monkeypatch.setattr("fedloom.federation.rounds.synchronous.PAUSE", PAUSE)
        monkeypatch.setattr("fedloom.federation.rounds.synchronous.time", clock)
        monkeypatch.setattr(Simulator, "run", run_with_losses)
        return asked

    return lose


def test_a_lost_client_that_is_back_before_the_deadline_saves_the_round(tiny_recipe, tmp_path, losing):
    undisturbed = run(tiny_recipe(RECIPE), tmp_path / "undisturbed").summary["adapter_sha256"]
    asked = losing(4, "absent")
    found = run(tiny_recipe(RECIPE, **{"federation.round_deadline": 60.0}), tmp_path / "run").summary
    assert len(asked) == 4
    assert found["adapter_sha256"] == undisturbed
    failed = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "client_failed"]
    assert [(e["client"], e["round"], e["reason"]) for e in failed] == [("last", 2, "absent")], "said once"


def test_one_that_stays_away_is_waited_for_until_the_deadline_and_no_longer(tiny_recipe, tmp_path, losing):
    asked = losing(10**6, "lost")
    with pytest.raises(RunFailed, match=r"round 2 got 2 usable updates and needs 3 .* 1 finished rounds are kept"):
        run(tiny_recipe(RECIPE, **{"federation.round_deadline": 2.0}), tmp_path / "run")
    assert [moment - asked[0] for moment in asked] == [PAUSE * n for n in range(9)], "to the deadline and not beyond it"
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest()[0].round == 1


@pytest.mark.parametrize(("fewest", "reason"), [(2, "lost"), (3, "bad_message")])
def test_nobody_waits_with_a_quorum_or_for_a_client_that_erred(tiny_recipe, tmp_path, losing, fewest, reason):
    asked = losing(10**6, reason)
    recipe = tiny_recipe({**RECIPE, "federation.min_clients": fewest, "federation.round_deadline": 60.0})
    if fewest == 3:
        with pytest.raises(RunFailed, match="round 2 got 2"):
            run(recipe, tmp_path / "run")
    else:
        assert run(recipe, tmp_path / "run").summary["failures"] == 1
    assert len(asked) == 1
