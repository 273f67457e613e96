"""SCAFFOLD: the invariant Σ p_k c_k = c, option II, no drift between unlike clients, and updates that never arrive."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from fedloom.algorithms.averaging.scaffold import Scaffold
from fedloom.messages.types import Payload
from fedloom.recipe.recipe import TrainConfig
from tests.helpers.averaging_rounds import (
    Federation,
    adapted,
    drawn,
    flat,
    local_run,
    made,
    saved,
    sequences,
    server,
    update,
)

SGD = TrainConfig(steps=3, batch_size=4, lr=0.05, optimizer="sgd", schedule="constant", clip=None)
DATA = {"x": sequences(1), "y": sequences(2), "z": sequences(3)}
EXAMPLES = {"x": 1, "y": 5, "z": 2}


def control(tensors, prefix="control/"):
    """Those under `prefix`, flat in name order, fp64."""
    return flat({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})


def own_control(federation, client):
    """c_k as the client will use it once it hears what was counted."""
    kept = federation.kept[client]
    counted = federation.server.round_payload(client).meta["counted"]
    own = control(kept.tensors)
    return own + control(kept.tensors, "pending/") if kept.meta["round"] == counted else own


def assert_invariant(federation, clients, examples=EXAMPLES):
    total = sum(examples[c] for c in clients)
    expected = sum(examples[c] * own_control(federation, c) for c in clients) / total
    seen = federation.server.control().double()
    assert float(expected.norm()) > 1e-3
    assert torch.allclose(seen, expected, rtol=1e-6, atol=1e-9)


def test_identical_clients_are_fedavg_bit_for_bit():
    alike = {c: sequences(1) for c in "xyz"}
    for train in (SGD, TrainConfig(steps=3, batch_size=4, lr=1e-2)):
        mine, plain = (Federation(name, alike, train, EXAMPLES) for name in ("scaffold", "fedavg"))
        for number in (1, 2, 3):
            mine.round(number)
            plain.round(number)
            assert mine.server.shared.sha256() == plain.server.shared.sha256(), number
        assert float(mine.server.control().norm()) > 1e-3


def test_unlike_clients_are_not_fedavg_after_the_first_round():
    mine, plain = (Federation(name, DATA, SGD, EXAMPLES) for name in ("scaffold", "fedavg"))
    for number in (1, 2):
        mine.round(number)
        plain.round(number)
        assert (mine.server.shared.sha256() == plain.server.shared.sha256()) == (number == 1)


def test_the_servers_control_is_the_weighted_mean_of_the_clients():
    federation = Federation("scaffold", DATA, SGD, EXAMPLES)
    for number in (1, 2, 3):
        federation.round(number)
        assert_invariant(federation, DATA)


def test_it_holds_for_any_sampling_over_the_clients_that_were_counted():
    federation = Federation("scaffold", DATA, SGD, EXAMPLES)
    for number, clients in enumerate((["x"], ["y"], ["x", "y"], ["z"], ["y", "z"]), 1):
        federation.round(number, clients)
        assert_invariant(federation, federation.kept)


def test_an_update_that_never_arrives_moves_no_control():
    """The client has trained and saved its state when its update is refused or late."""
    federation = Federation("scaffold", DATA, SGD, EXAMPLES)
    federation.round(1)
    federation.round(2, lost={"y"})
    assert_invariant(federation, DATA)
    before = own_control(federation, "y")
    federation.round(3)
    assert torch.equal(control(federation.kept["y"].tensors), before)  # what it trained round 3 with
    assert_invariant(federation, DATA)


def test_a_first_update_that_never_arrives_leaves_a_client_that_begins_afresh():
    federation = Federation("scaffold", DATA, SGD, EXAMPLES)
    federation.round(1, lost={"y"})
    assert_invariant(federation, ["x", "z"])
    assert float(own_control(federation, "y").norm()) == 0
    federation.round(2)
    assert_invariant(federation, DATA)


def test_option_two_under_plain_sgd():
    """c_k⁺ = c_k − c + (θ_t − y_K) / (K η), with c and c_k that are not zero."""
    federation = Federation("scaffold", DATA, SGD, EXAMPLES)
    federation.round(1)
    theta, c = flat(federation.server.shared.tensors()), federation.server.control().double()
    before = {k: own_control(federation, k) for k in DATA}
    federation.sent.clear()
    federation.round(2)
    for client, payload in federation.sent:
        y = flat({n: t for n, t in payload.tensors.items() if not n.startswith("control/")})
        expected = before[client] - c + (theta - y) / (3 * 0.05)
        assert torch.allclose(before[client] + control(payload.tensors), expected, rtol=1e-3, atol=2e-5)


class Bowls(Scaffold):
    """Client k's loss is ½ a_k ‖θ − b_k‖², in place of a language model's."""

    CURVES: ClassVar = {"x": (1.0, 0.0), "y": (4.0, 1.0)}

    def local_loss(self, model, batch, step_tokens):
        a, b = self.CURVES[self.client]
        return a / 2 * (model.parameter - b).square().sum() * len(batch.labels) / step_tokens


class PlainBowls(Bowls):
    """The same losses under FedAvg: no correction."""

    def before_step(self, model):
        super().before_step(model)
        model.grad.copy_(self._raw)


@pytest.mark.parametrize(("client", "lands"), [(Bowls, True), (PlainBowls, False)])
def test_unlike_curvatures_end_at_the_optimum_of_their_sum(client, lands):
    """FedAvg's local steps end elsewhere; a control variate of the wrong sign would end further off still."""
    weights = {"x": 3, "y": 1}
    train = TrainConfig(steps=10, batch_size=2, lr=0.1, optimizer="sgd", schedule="constant", clip=None)
    half = client(Scaffold.Options(), 0, made("scaffold").adapter)
    federation = Federation("scaffold", {c: sequences(1, 2) for c in "xy"}, train, weights, client=lambda: half)
    for number in range(1, 41):
        federation.round(number)
    a = {c: weights[c] * Bowls.CURVES[c][0] for c in "xy"}
    optimum = sum(a[c] * Bowls.CURVES[c][1] for c in "xy") / sum(a.values())
    off = float((federation.server.shared.flat - optimum).abs().max())
    assert (off < 1e-3) == lands, off


def test_all_clients_of_a_round_are_sent_the_same():
    """Updates are read while later clients are still sent their payloads."""
    federation = Federation("scaffold", DATA, SGD, EXAMPLES)
    for number in (1, 2):
        federation.received.clear()
        federation.round(number)
        first = federation.received[0][1].tensors
        for _, payload in federation.received:
            assert all(torch.equal(payload.tensors[n], first[n]) for n in first)
        assert (float(control(first).norm()) > 0) == (number == 2)


def test_a_clients_own_control_is_in_no_message():
    federation = Federation("scaffold", DATA, SGD, EXAMPLES)
    for number in (1, 2, 3):
        federation.round(number)
    names = set(federation.model.adapter.layout.names)
    for client, payload in [*federation.sent, *federation.received]:
        assert payload.tensors.keys() == names | {f"control/{n}" for n in names}
        own = own_control(federation, client)
        assert not torch.allclose(control(payload.tensors), own, rtol=1e-3)
        assert set(payload.meta) <= {"counted"}


def test_a_skipped_step_is_no_part_of_the_mean_gradient():
    ends = []
    for spoiled in (False, True):
        model = adapted()
        algorithm = made("scaffold")
        algorithm.model = model
        source = server("scaffold", model.initial_adapter().tensors())
        algorithm.begin("x", 1, None)
        algorithm.receive(source.round_payload("x"))
        plain = algorithm.local_loss
        seen = [0]

        def loss(model, batch, tokens, plain=plain, seen=seen, spoiled=spoiled):
            seen[0] += 1
            return plain(model, batch, tokens) * (float("nan") if spoiled and seen[0] == 3 else 1.0)

        algorithm.local_loss = loss
        train = TrainConfig(steps=2 + spoiled, batch_size=4, lr=0.05, optimizer="sgd", schedule="constant",
                            nonfinite="skip")  # fmt: skip
        result = algorithm.local_training(local_run(model, sequences(1), train))
        assert (result.steps, result.skipped_steps) == (2, int(spoiled))
        ends.append(control(algorithm.shared_state().tensors))
    assert torch.equal(ends[0], ends[1])


def test_state_comes_back_from_disk_bit_for_bit_with_thousands_of_clients():
    algorithm = server("scaffold", drawn(1))

    def sent(number, clients):
        for k in clients:
            change = {f"control/{n}": t for n, t in drawn(1000 * number + k).items()}
            yield update(f"client-{k}", {**drawn(k), **change}, k + 1, number)

    algorithm.aggregate(sent(1, range(2000)))
    back = server("scaffold", drawn(1))
    back.load_server_state(saved(algorithm))
    for one in (algorithm, back):
        one.aggregate(sent(2, range(0, 2000, 100)))
    assert algorithm.round_payload("client-100").meta == {"counted": 2}
    for client in ("client-1", "client-100", "new"):
        mine, theirs = algorithm.round_payload(client), back.round_payload(client)
        assert mine.meta == theirs.meta
        assert all(torch.equal(mine.tensors[n], theirs.tensors[n]) for n in mine.tensors)


def test_updates_without_their_control_are_refused():
    algorithm = server("scaffold", drawn(1))
    whole = {**drawn(2), **{f"control/{n}": t for n, t in drawn(3).items()}}
    algorithm.accept(update("x", whole))
    with pytest.raises(ValueError, match="missing: control/a"):
        algorithm.accept(update("x", {n: t for n, t in whole.items() if n != "control/a"}))
    with pytest.raises(ValueError, match="not finite"):
        algorithm.accept(update("x", {**whole, "control/b": torch.full((5,), float("nan"))}))


def test_personal_state_is_on_the_cpu_and_apart_from_the_live_model():
    federation = Federation("scaffold", DATA, SGD, EXAMPLES)
    federation.round(1, ["x"])
    state = federation.client.client_state()
    before = {n: t.clone() for n, t in state.tensors.items()}
    federation.model.adapter.flat.zero_()
    federation.round(2, ["y"])
    assert all(torch.equal(state.tensors[n], before[n]) for n in before)
    assert isinstance(state, Payload)


def test_a_server_that_starts_again_has_its_model_and_its_controls_back():
    """After a round from another start than the one that it is built with."""
    federation = Federation("scaffold", DATA, SGD, EXAMPLES)
    federation.round(1)
    kept = saved(federation.server)
    again = Federation("scaffold", DATA, SGD, EXAMPLES).server
    assert not torch.equal(again.shared.flat, federation.server.shared.flat)
    again.load_server_state(kept)
    assert torch.equal(again.shared.flat, federation.server.shared.flat)
    for client in DATA:
        mine, its = again.round_payload(client), federation.server.round_payload(client)
        assert mine.meta == its.meta == {"counted": 1}
        assert all(torch.equal(mine.tensors[n], t) for n, t in its.tensors.items())
    assert again.round_payload("nobody").meta == {"counted": 0}
