"""The simulator: one client object for all, messages that are really encoded, and their bytes counted."""

from __future__ import annotations

import torch

from fedloom.federation.client import held_seconds
from fedloom.messages import wire
from fedloom.messages.types import Assignment, Cost, Failure, Payload, Update
from fedloom.runtimes.simulator import Simulator, _shared


class Echo:
    """A client that sends back what it got, and keeps a note of it."""

    def __init__(self):
        self.seen = []
        self.closed = False

    def handle(self, assignment):
        self.seen.append(assignment)
        if assignment.client == "broken":
            return Failure("broken", assignment.round, "test", "as asked", Cost(steps=1))
        return Update(assignment.client, assignment.round, assignment.payload, cost=Cost(steps=2))

    def close(self):
        self.closed = True


def assignments(*clients):
    for number, client in enumerate(clients):
        yield Assignment("train", client, 1, 3, Payload({"w": torch.full((3,), float(number))}))


def test_messages_are_encoded_and_their_bytes_counted():
    client = Echo()
    simulator = Simulator(client, ("a", "b", "broken"))
    assert simulator.clients == ("a", "b", "broken")
    sent = list(assignments("a", "b", "broken"))
    outcomes = list(simulator.run(iter(sent)))
    assert [o.client for o in outcomes] == ["a", "b", "broken"]
    assert isinstance(outcomes[2], Failure)
    for assignment, outcome in zip(sent, outcomes, strict=True):
        assert outcome.cost.download_bytes == len(wire.encode_assignment(assignment))
        assert outcome.cost.upload_bytes > 0
    assert [o.cost.steps for o in outcomes] == [2, 2, 1]
    assert torch.equal(outcomes[1].payload.tensors["w"], torch.ones(3))


def test_client_and_server_share_no_memory():
    client = Echo()
    payload = Payload({"w": torch.zeros(3)})
    (outcome,) = Simulator(client, ("a",)).run([Assignment("train", "a", 1, 1, payload)])
    client.seen[0].payload.tensors["w"].fill_(7)
    assert torch.equal(payload.tensors["w"], torch.zeros(3))
    assert torch.equal(outcome.payload.tensors["w"], torch.zeros(3))


def test_work_is_done_one_client_at_a_time_as_it_is_asked_for():
    client = Echo()
    stream = Simulator(client, ("a", "b")).run(assignments("a", "b"))
    assert client.seen == []
    next(stream)
    assert [a.client for a in client.seen] == ["a"]


def test_closing_reaches_the_client():
    client = Echo()
    Simulator(client, ()).close()
    assert client.closed


def test_a_cohorts_time_is_dealt_out_by_tokens_and_evenly_where_nobody_trained():
    done = [Update(n, 1, Payload(), cost=Cost(train_tokens=t, cpu_seconds=9.0)) for n, t in (("a", 30), ("b", 10))]
    shared = _shared([*done, Failure("c", 1, "test", "as asked", Cost(cpu_seconds=9.0))], wall=8.0, cpu=4.0)
    assert [(o.cost.wall_seconds, o.cost.cpu_seconds) for o in shared] == [(6.0, 3.0), (2.0, 1.0), (0.0, 0.0)]
    failed = [Failure(n, 1, "test", "as asked") for n in "ab"]
    assert [o.cost.wall_seconds for o in _shared(failed, wall=8.0, cpu=4.0)] == [4.0, 4.0]


def test_time_on_a_gpu_is_the_works_own_for_each_device_and_a_cohorts_is_dealt_out():
    assert held_seconds(torch.device("cuda", 0), 2, 3.0) == 6.0
    assert held_seconds(torch.device("cpu"), 2, 3.0) == held_seconds(None, 1, 3.0) == 0.0
    done = [Update(n, 1, Payload(), cost=Cost(train_tokens=t, gpu_seconds=8.0)) for n, t in (("a", 30), ("b", 10))]
    shared = _shared(done, wall=8.0, cpu=4.0)
    assert [o.cost.gpu_seconds for o in shared] == [6.0, 2.0]
    assert sum((o.cost for o in shared), Cost()).gpu_seconds == 8.0
