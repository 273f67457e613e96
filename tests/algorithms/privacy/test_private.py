"""Privacy around every plain sum: what one client can change, the noise that is promised, and what is counted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from fedloom.algorithms.averaging import fedavg
from fedloom.algorithms.privacy import accounting, clipping, private
from fedloom.algorithms.privacy.private import CLIP, OWN, WITHIN, Private
from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.federation.checks import check_algorithm
from fedloom.messages.at_rest import from_bytes, to_bytes
from fedloom.messages.types import Payload, Update
from tests.helpers.federation import Federation

SUMS = [
    name
    for name in registry.algorithms.names()
    if (p := registry.algorithms.get(name).properties).linear_sum and not p.pooled
]
OTHERS = [name for name in registry.algorithms.names() if name not in SUMS]
FREE = {"noise": 0.0, "clip": 1e9}
WIDE = {"adapter.rank": 16}  # 16,384 numbers: enough to tell a variance by


def test_these_are_plain_sums():
    """A new one that declares it is tested by the rest of this file; one that no longer does is noticed here."""
    assert set(SUMS) == {
        "diloco", "ditto", "fed_sb", "fedadagrad", "fedadam", "fedavg", "fedavg_outer", "fedavgm", "fedbiot", "feddpa",
        "fedmezo", "fedot", "fedper", "fedprox", "fedrep", "fedrot_lora", "fedsa_lora", "fedsvd", "fedyogi", "ffa_lora", "pfedme", "rolora", "slora",
    }  # fmt: skip


@pytest.fixture
def federation(tiny_recipe, tmp_path):
    def make(privacy=None, **values) -> Federation:
        privacy = privacy and {"seeded": True, **privacy}
        return Federation(tiny_recipe({"privacy": privacy, **values}), tmp_path / f"f{len(list(tmp_path.iterdir()))}")

    return make


def same(a: Payload, b: Payload) -> bool:
    return (
        a.meta == b.meta
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())
    )


# ------------------------------------------------------------------ every plain sum


@pytest.mark.parametrize("name", SUMS)
def test_unclipped_and_without_noise_it_is_the_algorithm_with_equal_weights(name, federation):
    """To rounding: here a client's change travels, there its weights."""
    plain, wrapped = federation(algorithm=name), federation(FREE, algorithm=name)
    start = from_bytes(to_bytes(plain.server.server_state())).tensors
    updates = [replace(plain.train(c, 1), num_examples=1, num_tokens=1) for c in plain.clients]
    plain.server.aggregate(iter(updates))
    plain.server.server_step()
    wrapped.round(1)
    expected, got = plain.server.server_state().tensors, wrapped.server.server_state().tensors
    assert expected.keys() == {n for n in got if not n.startswith(OWN)}
    for key, tensor in expected.items():  # 1e-5: server optimisers divide by the size of a small pseudo-gradient
        assert torch.allclose(tensor.double(), got[key].double(), rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(t, start[n]) for n, t in expected.items())
    kept = from_bytes(to_bytes(wrapped.server.server_state()))
    wrapped.server.aggregate(iter([]))  # another round, with nobody in it
    assert not same(wrapped.server.server_state(), kept)
    wrapped.server.load_server_state(kept)
    assert same(wrapped.server.server_state(), kept)
    one = plain.clients[0]  # what a personal algorithm keeps there is untouched too
    assert torch.allclose(plain.evaluated(one, 1), wrapped.evaluated(one, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "where"),
    [*((name, "client") for name in SUMS), ("fedavg", "server"), ("fedper", "server"), ("fed_sb", "server")],
)
def test_all_that_leaves_a_client_is_its_clipped_change(name, where, federation, monkeypatch):
    """One vector within the clip, a bit, and with local noise nothing of either in the clear."""
    federation = federation({"noise": 1.0, "clip": 1e-3, "where": where, "adaptive": {}}, algorithm=name)
    clear, inner = [], type(federation.server.inner)
    sends = inner.shared_state

    def overheard(self):
        payload = sends(self)
        clear.append(
            {n: t.detach().double() - federation.client._algorithm._received[n] for n, t in payload.tensors.items()}
        )
        return payload

    monkeypatch.setattr(inner, "shared_state", overheard)
    federation.round(1)
    sent = [m.up for m in federation.messages]
    assert len(clear) == len(sent) == 3
    for change, payload in zip(clear, sent, strict=True):
        assert not payload.meta
        assert payload.tensors.keys() == change.keys() | {WITHIN}
        vector = torch.cat([payload.tensors[n].flatten().double() for n in change])
        own = torch.cat([change[n].flatten() for n in change])
        assert own.norm() > 2e-3  # so that clipping shows
        shortened = own * (1e-3 / own.norm())
        if where == "server":
            assert torch.allclose(vector, shortened, rtol=1e-5, atol=1e-9)
            assert float(payload.tensors[WITHIN]) == -0.5
        else:
            noise = (vector - shortened) / (1e-3 * federation.server.deviations.vector)
            assert 0.5 < float(noise.square().mean()) < 2.0
            assert float(noise.abs().min()) > 0
            assert abs(float(payload.tensors[WITHIN])) != 0.5


def test_a_sum_that_sends_more_than_it_was_sent_is_stopped_at_the_client(federation, monkeypatch):
    federation = federation(FREE)
    monkeypatch.setattr(fedavg.FedAvg, "shared_state", lambda self: Payload({"extra": torch.ones(2)}))
    with pytest.raises(ValueError, match="extra would leave the client unclipped"):
        federation.train("copy", 1)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_plain_sum_is_refused_before_any_work(name, tiny_recipe):
    recipe = tiny_recipe({"algorithm": name, "privacy.noise": 1.0})
    with pytest.raises(UserError, match=rf"which {name} is not: use one of diloco, .*fedavg, .*slora"):
        check_algorithm(recipe)


# ------------------------------------------------------------------ what one client can change


def mean_of(server: Private, updates: list[Update], monkeypatch) -> tuple[torch.Tensor, float]:
    """m times the mean that the algorithm inside is handed, and the sum of bits; the server is left as it was."""
    kept, seen = from_bytes(to_bytes(server.server_state())), []
    with monkeypatch.context() as patch:
        patch.setattr(Private, "_stepped", lambda self, layout, mean, number: seen.append(mean) or {})
        metrics = server.aggregate(iter(updates))
    server.load_server_state(kept)
    return seen[0] * server.expected, (metrics.get("within_clip", 0.5) - 0.5) * server.expected


@pytest.mark.parametrize("name", ["fedavg", "ffa_lora", "fed_sb"])
def test_a_neighbour_changes_the_sum_by_the_clip_at_most(name, federation, monkeypatch):
    """One client left out: C; put in another's place: 2C. Whatever it sends, the most extreme values included."""
    clip = 0.7
    server = federation({"noise": 0.0, "clip": clip, "adaptive": {}}, algorithm=name).server
    shapes = server.update_layout().shapes
    largest = []

    @settings(
        max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        st.lists(
            st.tuples(st.integers(0, 99), st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6, 1e17])), min_size=2, max_size=4
        )
    )
    def neighbours(drawn):
        updates = []
        for number, (seed, scale) in enumerate(drawn):
            draw = torch.Generator().manual_seed(seed)
            tensors = {n: scale * torch.randn(s, generator=draw) for n, s in shapes.items()}
            updates.append(Update(f"c{number}", 1, Payload(tensors), num_examples=10**6 * number + 1))
            server.accept(updates[-1])
        everybody, bits = mean_of(server, updates, monkeypatch)
        without, fewer_bits = mean_of(server, updates[1:], monkeypatch)
        change = float((everybody - without).norm())
        largest.append(change)
        assert change <= clip * (1 + 1e-12)
        assert abs(bits - fewer_bits) <= 0.5 + 1e-12
        opposite = replace(updates[0], payload=Payload({n: -t for n, t in updates[0].payload.tensors.items()}))
        replaced, _ = mean_of(server, [opposite, *updates[1:]], monkeypatch)
        assert float((everybody - replaced).norm()) <= 2 * clip * (1 + 1e-12)

    neighbours()
    assert max(largest) == pytest.approx(clip)  # the bound is met, so it is the clip that holds it


@pytest.mark.parametrize("where", ["server", "client"])
def test_a_hostile_client_moves_the_model_no_further_than_an_honest_one_may(where, federation, monkeypatch):
    federation = federation({"noise": 1.0, "clip": 0.01, "where": where})
    server = federation.server
    updates = [federation.train(c, 1) for c in federation.clients]
    hostile = replace(updates[0], payload=Payload({n: t * 1e8 for n, t in updates[0].payload.tensors.items()}))
    assert private.clipping.norm_of(private.flattened(server._layout(), hostile.payload.tensors)) > 1e5
    server.accept(hostile)
    kept = to_bytes(server.server_state())
    places = []
    for sent in (updates[1:], [hostile, *updates[1:]]):
        server.load_server_state(from_bytes(kept))
        server.aggregate(iter(sent))
        places.append(server.deployed().adapter.flat.double())
    bound = 0.01
    if where == "client":  # what honest noise may reach
        bound = clipping.largest_honest(0.01, 0.01, server._layout().numel)
    assert float((places[0] - places[1]).norm()) <= bound / 3 * 1.001


def test_weights_that_clients_claim_do_not_count(federation, monkeypatch):
    federation = federation({"noise": 0.0, "clip": 0.01})
    updates = [federation.train(c, 1) for c in federation.clients]
    one, _ = mean_of(federation.server, updates, monkeypatch)
    louder = [replace(u, num_examples=10**i, num_tokens=7) for i, u in enumerate(updates)]
    assert torch.equal(one, mean_of(federation.server, louder, monkeypatch)[0])


def test_a_failed_client_leaves_the_denominator_and_the_noise(federation, monkeypatch):
    federation = federation({"noise": 0.5, "clip": 0.01})
    server = federation.server
    updates = [federation.train(c, 1) for c in federation.clients]
    layout = server._layout()
    clipped = [clipping.clipped(private.flattened(layout, u.payload.tensors), 0.01) for u in updates]
    noise, _ = server._noise(layout.numel, 1, "")
    for present in (0, 1, 3):
        total, _ = mean_of(server, updates[:present], monkeypatch)
        expected = noise + sum(clipped[:present])
        assert torch.allclose(total, expected, atol=1e-15)


# ------------------------------------------------------------------ the noise


def within(sample: torch.Tensor, variance: float) -> bool:
    """Whether the sample's variance is `variance` to five standard errors; a factor of 1.1 is far outside."""
    error = 5 * math.sqrt(2 / sample.numel())
    assert error < 0.1
    return abs(float(sample.square().mean()) / variance - 1) < error


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("adaptive", [None, {"noise": 0.8}])
def test_the_sums_noise_has_the_promised_variance(seeded, adaptive, federation, monkeypatch):
    noise, clip = 1.25, 0.3
    server = federation({"noise": noise, "clip": clip, "seeded": seeded, "adaptive": adaptive}, **WIDE).server
    total = mean_of(server, [], monkeypatch)[0]
    z = noise if adaptive is None else (noise**-2 - 1.6**-2) ** -0.5
    assert within(total, (z * clip) ** 2)
    assert not within(total, (1.1 * z * clip) ** 2) and not within(total, (z * clip / 1.1) ** 2)
    assert stats.kstest((total / (z * clip)).numpy(), "norm").pvalue > 1e-6
    if adaptive:
        counts = torch.tensor([server._noise(1, r, "")[1] for r in range(6000)])
        assert within(counts, 0.8**2) and not within(counts, (1.1 * 0.8) ** 2)
    repeated = mean_of(server, [], monkeypatch)[0]
    assert torch.equal(total, repeated) == seeded


def test_local_noise_is_each_clients_own_and_adds_up(federation, monkeypatch):
    noise, clip = 0.75, 0.02
    federation = federation({"noise": noise, "clip": clip, "where": "client"}, **WIDE)
    quiet = federation.server._layout()
    received = [private.flattened(quiet, federation.train(c, 1).payload.tensors) for c in federation.clients]
    drawn = [federation.server._noise(quiet.numel, 1, c)[0] for c in federation.clients]
    for vector, own in zip(received, drawn, strict=True):
        assert within(vector, (noise * clip) ** 2 + clip**2 / quiet.numel)
        assert float((vector - own).norm()) <= clip * (1 + 1e-5)
    correlation = torch.corrcoef(torch.stack(drawn))
    assert float((correlation - torch.eye(3)).abs().max()) < 0.1
    assert within(sum(drawn), 3 * (noise * clip) ** 2)


def test_two_rounds_have_different_noise(federation):
    server = federation({"noise": 1.0}).server
    assert not torch.equal(server._noise(50, 1, "")[0], server._noise(50, 2, "")[0])
    assert not torch.equal(server._noise(50, 1, "a")[0], server._noise(50, 1, "b")[0])


# ------------------------------------------------------------------ the clip that adapts, and what is counted


def test_clients_are_sent_the_clip_and_the_clip_follows_them(federation):
    federation = federation({"noise": 0.0, "clip": 1e-3, "adaptive": {"lr": 0.5}}, **{"federation.rounds": 3})
    for number in (1, 2, 3):
        federation.round(number)
    clips = [float(m.down.tensors[CLIP]) for m in federation.messages]
    assert clips == sorted(clips) and len(set(clips)) == 3
    # nobody was within the clip: b̃ = 0, so it grows by exp(η γ) a round
    assert clips[-1] == pytest.approx(1e-3 * math.exp(2 * 0.5 * 0.5))


@pytest.mark.parametrize("adaptive", [None, {}])
def test_the_ledger_counts_rounds(adaptive, federation):
    server = federation({"noise": 1.1, "adaptive": adaptive}).server
    assert server.guarantee()["epsilon"] == 0.0
    for number in (1, 2):
        metrics = server.aggregate(iter([]))
        assert metrics["epsilon"] == accounting.spent(1.1, number, 1.0, 1e-5)
    assert server.guarantee()["epsilon"] == metrics["epsilon"]
    assert server.ledger.entries == [(2, 1.1, 1.0)]


def test_against_the_server_a_client_has_its_own_noise_and_twice_the_sensitivity(federation):
    federation = federation({"noise": 3.0, "where": "client"})
    updates = [federation.train(c, 1) for c in federation.clients]
    federation.server.aggregate(iter(updates))
    metrics = federation.server.aggregate(iter(updates[:2]))
    assert metrics["epsilon"] == accounting.spent(1.5, 2, 1.0, 1e-5)
    both = accounting.Ledger()
    both.add(3.0 * math.sqrt(3))
    both.add(3.0 * math.sqrt(2))
    assert metrics["epsilon_models"] == both.epsilon(1e-5) < metrics["epsilon"]


def test_without_noise_nothing_is_promised_and_norms_are_shown(federation):
    federation = federation({"noise": 0.0, "clip": 1e9})
    federation.round(1)
    metrics = federation.server.aggregate(iter([]))
    assert "epsilon" not in metrics and federation.server.guarantee()["epsilon"] is None
    updates = [federation.train(c, 2) for c in federation.clients]
    metrics = federation.server.aggregate(iter(updates))
    norms = sorted(clipping.norm_of(private.flattened(federation.server._layout(), u.payload.tensors)) for u in updates)
    assert metrics["median_norm"] == norms[1]
    assert "median_norm" not in federation.server.inner.server_state().tensors


def test_with_noise_no_number_of_a_round_is_a_clients(federation):
    """What is logged follows from the noisy mean, whoever sent what."""
    federation = federation({"noise": 1.0, "clip": 0.01})
    updates = [federation.train(c, 1) for c in federation.clients]
    for sent in ([], updates):
        assert set(federation.server.aggregate(iter(sent))) == {"distance_moved", "clip", "epsilon", "delta"}


# ------------------------------------------------------------------ rounds done again, and the ledger on disk


@pytest.mark.parametrize(("rounds", "again"), [(0, False), (1, True), (3, True)])
def test_rounds_that_are_done_again_count_again(rounds, again, federation):
    server = federation({"noise": 1.1, "seeded": False}).server
    server.aggregate(iter([]))
    assert server.repeated(rounds) is again
    assert server.ledger.entries == [(1 + rounds, 1.1, 1.0)]
    assert server.guarantee()["releases"] == 1 + rounds
    seeded = federation({"noise": 1.1, "seeded": True}).server
    seeded.aggregate(iter([]))
    assert seeded.repeated(rounds) is False and seeded.ledger.entries == [(1, 1.1, 1.0)]


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_with_noise_at_the_clients_the_round_that_was_cut_off_counts_too(rounds, federation):
    """Some may have sent in it: against the server one release more than rounds; of the models there is none of it."""
    server = federation({"noise": 3.0, "where": "client", "seeded": False}).server
    assert server.repeated(rounds) is True
    assert server.ledger.entries == [(rounds + 1, 1.5, 1.0)]
    assert server.joint.entries == ([(rounds, 3.0, 1.0)] if rounds else [])


def test_the_ledgers_come_back_from_disk(federation):
    """Two kinds of entries in each: what was spent goes on, bit for bit."""
    federation = federation({"noise": 3.0, "where": "client", "adaptive": {}})
    server, other = (
        federation.server,
        federation.server.__class__(federation.server.inner, federation.server.privacy, federation.server.expected),
    )
    updates = [federation.train(c, 1) for c in federation.clients]
    for sent in (updates, updates[:2], updates[:2]):
        server.aggregate(iter(sent))
    server.ledger.add(0.1 + 0.2, 1 / 3, 7)
    kept = from_bytes(to_bytes(server.server_state()))
    other.load_server_state(kept)
    assert other.ledger.entries == server.ledger.entries and len(server.ledger.entries) == 2
    assert other.joint.entries == server.joint.entries == [(1, 3.0 * math.sqrt(3), 1.0), (2, 3.0 * math.sqrt(2), 1.0)]
    assert all(type(count) is int for count, *_ in other.ledger.entries)
    assert (other.finished, other.clip) == (3, server.clip)
    assert other.ledger.releases == 10
    empty = accounting.Ledger.of(from_bytes(to_bytes(Payload({"x": accounting.Ledger().tensor()}))).tensors["x"])
    assert empty.entries == [] and empty.epsilon(1e-5) == 0.0
