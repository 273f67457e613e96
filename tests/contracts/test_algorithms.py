"""The contract: whatever an algorithm declares of itself is tested here, for every registered name.

Most of it is `fedloom.testing`, which checks other people's algorithms too. What needs fedloom's inside is tested here.

Two small algorithms of the tests' own (helpers/merging.py) go through the same suite; they use what no shipped one uses yet: the
base-weight delta, and personal tensors beside shared ones.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fedloom
import fedloom.federation.client
import fedloom.federation.workplace
from fedloom.algorithms.base import Algorithm
from fedloom.common import registry
from fedloom.common.errors import ClientFailed, RunFailed
from fedloom.common.files import folder_name
from fedloom.data.batching import Plan, collate, round_indices
from fedloom.data.corpus import Partition
from fedloom.evaluation.loss import loss_sums
from fedloom.experiment.prepare import Setting, prepare
from fedloom.federation.record.checkpoints import Checkpoints, ClientStore
from fedloom.federation.rounds.schedule import Schedule
from fedloom.federation.watch import Watch
from fedloom.messages import wire
from fedloom.messages.at_rest import from_bytes, load_tensors, to_bytes
from fedloom.messages.types import Assignment, Outcome, Payload, Update
from fedloom.models.saved import load_adapted
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.simulator import Simulator
from fedloom.testing.case import Case
from fedloom.testing.contract import CHECKS
from fedloom.training.trainer import LocalRun, fit
from tests.helpers import merging

pytestmark = pytest.mark.usefixtures("loading_once", "no_waiting", "no_reports")

#: Trained without an optimiser of torch's.
ZEROTH_ORDER = {"fedkseed", "fedmezo", "decomfl"}

OWN = {"test-merging": merging.Merging, "test-keeping": merging.Keeping}
SHIPPED = registry.algorithms.names()
ALL = [*SHIPPED, *OWN]


#: Options that make an algorithm's run shorter and change nothing of what is asked here.
LIGHT: dict[str, dict[str, Any]] = {"ferret": {"algorithm.bases": 256}}


def of(name: str) -> dict[str, Any]:
    return {"algorithm": name, **LIGHT.get(name, {})}


def class_of(name: str) -> type[Algorithm]:
    return OWN.get(name) or registry.algorithms.get(name)


def properties(name: str):
    return class_of(name).properties


def those(wanted: Callable[[Any], Any]) -> list[str]:
    return [name for name in ALL if wanted(properties(name))]


@pytest.fixture(autouse=True)
def _own_algorithms(monkeypatch):
    for name, cls in OWN.items():
        monkeypatch.setitem(registry.algorithms._targets, name, cls)


# ------------------------------------------------------------------ what a run leaves


def result(folder: Path) -> dict[str, Any]:
    """Every bit that a run ends with: the digest, the losses, each personal adapter and each client's own state."""
    summary = json.loads((folder / "summary.json").read_text())
    evaluations = [
        {k: v for k, v in event.items() if k not in {"seconds", "time"}}
        for event in map(json.loads, (folder / "events.jsonl").read_text().splitlines())
        if event["event"] == "evaluation"
    ]
    tensors = {
        path.relative_to(folder).as_posix(): {n: t.tolist() for n, t in load_tensors(path).items()}
        for path in sorted(folder.rglob("*.safetensors"))
        if "checkpoints" not in path.parts
    }
    return {
        "sha256": summary["adapter_sha256"],
        "loss": summary["loss"],
        "tensors": tensors,
        "last": evaluations[-1]["loss"],
    }


def run(recipe: Recipe, out: Path, **options: Any) -> dict[str, Any]:
    return result(fedloom.run(recipe, out=out, **options).folder)


def server_state(folder: Path) -> Payload:
    state, damages = Checkpoints(folder / "checkpoints").newest()
    assert state is not None
    assert not damages
    return state.server


def same(a: Payload, b: Payload) -> bool:
    return (
        a.meta == b.meta
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())
    )


# ------------------------------------------------------------------ what tests share


@dataclass
class Whole:
    """An undisturbed run of one algorithm: two rounds, with dropout, and optimisers that go on."""

    case: Case
    result: dict[str, Any]
    spy: Wire

    @property
    def recipe(self) -> Recipe:
        return self.case.recipe


WHOLE: dict[str, Whole] = {}


@pytest.fixture
def whole(name, tiny_recipe, tmp_path_factory) -> Whole:
    """Made once; its tests read it and change nothing."""
    if name not in WHOLE:
        values = {"adapter.dropout": 0.1, "train.optimizer_state": "keep", "train.schedule": "constant"}
        case = Case(class_of(name), name, tiny_recipe({**of(name), **values}), tmp_path_factory.mktemp("case"))
        spy = Wire()
        with pytest.MonkeyPatch.context() as patch:
            spy.install(patch)
            WHOLE[name] = Whole(case, result(case.whole.folder), spy)
    return WHOLE[name]


# ------------------------------------------------------------------ what is asked of every package's algorithm


def draws(name: str) -> bool:
    """Whether the algorithm draws random numbers of its own."""
    return "fedloom.common.randomness" in Path(inspect.getfile(class_of(name))).read_text(encoding="utf-8")


def needs(name: str, check: str) -> bool:
    """Whether the check is asked here; what a stronger test asks already is left out.

    One seed gives the same bits: `client state` compares a second run with the first, and so does the order of clients
    below; another seed is about what an algorithm draws itself. test_cohorts.py is about cohorts.
    """
    if check == "repeatable":
        return draws(name) or not properties(name).order_independent or name == "fedavg"
    return check not in {"neutral", "cohorts"} and not (name in OWN and check == "words")  # those have no `about`


@pytest.mark.parametrize(("name", "check"), [(n, c) for n in ALL for c in CHECKS if needs(n, c)])
def test_it_passes_what_check_algorithm_asks(name, check, whole, tiny_recipe, tmp_path):
    case = whole.case
    if check == "costs" and properties(name).offsite:  # an evaluation between rounds takes a changed emulator along
        case = Case(class_of(name), name, tiny_recipe({**of(name), "evaluation.every": 0}), tmp_path)
    assert CHECKS[check](case) == []


# ------------------------------------------------------------------ determinism


@pytest.mark.parametrize("name", those(lambda p: p.order_independent))
def test_the_order_of_the_clients_changes_nothing(name, whole, tmp_path, monkeypatch):
    """Neither that in which the split lists them, nor that in which they are trained."""
    split, forwards = fedloom.federation.workplace.partition, Simulator.run

    def reversed_clients(*args: Any) -> Partition:
        made = split(*args)
        return replace(made, shards=dict(reversed(made.shards.items())))

    def rotated(self: Simulator, work: Iterator[Assignment]) -> Iterator[Outcome]:
        first, *others = work  # of three clients, neither the order of the split nor its reverse
        return forwards(self, iter([*others, first]))

    monkeypatch.setattr(fedloom.federation.workplace, "partition", reversed_clients)
    monkeypatch.setattr(Simulator, "run", rotated)
    found = run(whole.recipe, tmp_path / "run")
    assert found["sha256"] == whole.result["sha256"]
    assert found["tensors"] == whole.result["tensors"]


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("name", ALL)
def test_more_rounds_later_are_more_rounds_at_once(name, whole, tmp_path):
    run(whole.recipe.with_values({"federation.rounds": 1}), tmp_path / "run")
    extended = run(whole.recipe, tmp_path / "run", resume=True)
    assert extended["sha256"] == whole.result["sha256"]
    assert extended["tensors"] == whole.result["tensors"]
    assert same(server_state(tmp_path / "run"), server_state(whole.case.whole.folder))


@pytest.mark.parametrize("name", ALL)
def test_a_clients_own_state_comes_back_bit_for_bit(name, tiny_recipe, tmp_path):
    _, kept, _, fresh = play(name, tiny_recipe)
    algorithm, store = fresh(), ClientStore(tmp_path / "again")
    algorithm.begin("another", 2, None)
    nothing = from_bytes(to_bytes(algorithm.client_state()))
    assert not any(t.numel() > 1 or t.any() for t in nothing.tensors.values())
    for client, state in kept.items():
        store.save(client, 1, {"personal": state})
        loaded = store.load(client, 1).get("personal", Payload())
        assert same(loaded, state)
        algorithm.begin(client, 2, loaded)
        assert same(algorithm.client_state(), state)
        assert algorithm.client == client
        algorithm.begin("another", 2, None)
        assert same(algorithm.client_state(), nothing)
    if properties(name).personal:
        assert any(s.tensors for s in kept.values())


@pytest.mark.parametrize("name", those(lambda p: p.asynchronous))
def test_an_asynchronous_algorithm_has_one_global_model_and_depends_on_the_order(name):
    """A client's state may be newer than what has arrived of it, so there is no personal model as of a round."""
    assert not (properties(name).personal or properties(name).pooled or properties(name).order_independent)


# ------------------------------------------------------------------ failures


@dataclass
class Faults:
    """Clients that fail after they trained, with the model changed and its gradients used."""

    plan: dict[tuple[str, int], str]

    def install(self, monkeypatch, algorithm: type[Algorithm]) -> None:
        train, local_training = fedloom.federation.client.Client._train, algorithm.local_training

        def failing(client, assignment):
            update = train(client, assignment)
            if (assignment.client, assignment.round) in self.plan:
                raise AssertionError("the failure has to come before the client's state is kept")
            return update

        def failing_training(learner, local):
            trained = local_training(learner, local)
            if (learner.client, learner.round) in self.plan:
                raise ClientFailed(self.plan[learner.client, learner.round], "made to fail")
            return trained

        monkeypatch.setattr(fedloom.federation.client.Client, "_train", failing)
        monkeypatch.setattr(algorithm, "local_training", failing_training)


def without_the_last_in_round_1(asked: Callable[..., tuple[str, ...]]) -> Callable[..., tuple[str, ...]]:
    def those_left(self: Schedule, round: int, *options: int) -> tuple[str, ...]:
        return tuple(client for client in asked(self, round, *options) if (client, round) != ("last", 1))

    return those_left


@pytest.mark.parametrize("name", those(lambda p: not p.pooled))
def test_a_failed_client_is_as_if_it_had_not_been_sampled(name, whole, tmp_path, monkeypatch):
    recipe = whole.recipe
    with monkeypatch.context() as patch:
        Faults({("last", 1): "non_finite"}).install(patch, class_of(name))
        failed = run(recipe, tmp_path / "failed")
    with monkeypatch.context() as patch:
        for asked in ("sample", "queue"):
            patch.setattr(Schedule, asked, without_the_last_in_round_1(getattr(Schedule, asked)))
        left_out = run(recipe, tmp_path / "left-out")
    assert failed == left_out
    assert same(server_state(tmp_path / "failed"), server_state(tmp_path / "left-out"))
    assert failed["sha256"] != whole.result["sha256"]


@pytest.mark.parametrize("name", those(lambda p: p.pooled))
def test_a_failed_pool_ends_the_run_with_the_servers_state_untouched(name, tiny_recipe, tmp_path, monkeypatch):
    Faults({("all-clients", 1): "non_finite"}).install(monkeypatch, class_of(name))
    recipe = tiny_recipe({**of(name)})
    with pytest.raises(RunFailed, match="0 usable updates"):
        fedloom.run(recipe, out=tmp_path / "run")
    assert same(server_state(tmp_path / "run"), prepare(recipe, Watch()).algorithm.server_state())


@pytest.mark.parametrize("name", ALL)
def test_a_refused_update_leaves_the_servers_state_untouched(name, whole, tmp_path, monkeypatch):
    """Every client sends garbage: the round is below its quorum and nothing of it is kept."""
    encode = wire.encode_outcome

    def spoiled(outcome, **how):
        if isinstance(outcome, Update) and outcome.payload.tensors:
            sent = outcome.payload.tensors
            tensors = {n: torch.full_like(t, torch.nan) if t.is_floating_point() else t for n, t in sent.items()}
            outcome = replace(outcome, payload=Payload(tensors))
        elif isinstance(outcome, Update) and outcome.num_examples:
            outcome = replace(outcome, payload=Payload({"foreign": torch.ones(1)}))
        return encode(outcome, **how)

    monkeypatch.setattr(wire, "encode_outcome", spoiled)
    with pytest.raises(RunFailed, match="0 usable updates"):
        fedloom.run(whole.recipe, out=tmp_path / "run")
    assert same(server_state(tmp_path / "run"), whole.case.server().server_state())
    events = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert {e["reason"] for e in events if e["event"] == "client_failed"} == {"bad_payload"}


# ------------------------------------------------------------------ neutral options


@pytest.mark.parametrize("name", those(lambda p: p.neutral is not None))
def test_with_neutral_options_one_client_is_plain_local_training(name, tiny_recipe, tmp_path):
    """Two rounds of the federation against one uninterrupted fit over all their steps, bit for bit."""
    neutral = {f"algorithm.{k}": v for k, v in properties(name).neutral.items()}
    values = {"split.splitter": "uniform", "split.num_clients": 1, "train.optimizer_state": "keep", "train.steps": 3}
    recipe = tiny_recipe({**of(name), **neutral, **values})
    run(recipe, tmp_path / "run")

    setting = prepare(recipe, Watch())
    (client,) = setting.data.partition.training_clients
    shard, train = setting.data.client(client), setting.recipe.train
    plan = Plan(train.batch_size, steps=3)
    steps = [
        [collate([shard.sequences[i] for i in p], packed=True, pad=0, examples=p) for p in passes]
        for round in (1, 2)
        for passes in round_indices(shard.train, plan, round, recipe.seed, client)
    ]
    cls = registry.algorithms.get("fedavg")
    fit(setting.model, cls(cls.Options(), 0, recipe.adapter), steps, train, first_step=0, total_steps=6)

    folder = tmp_path / "run" / "adapter"
    if properties(name).personal:
        folder = tmp_path / "run" / "adapters" / folder_name(client)
    tensors = load_tensors(folder / "adapter_model.safetensors")
    assert tensors.keys() == setting.model.adapter.views.keys()
    assert all(torch.equal(t, setting.model.adapter.views[n]) for n, t in tensors.items())


# ------------------------------------------------------------------ what travels


@dataclass
class Wire:
    """Everything that was encoded, by direction, and everything that clients kept."""

    down: list[tuple[str, int, str, Payload]] = field(default_factory=list)
    up: list[tuple[str, int, Payload]] = field(default_factory=list)
    kept: list[tuple[str, int, dict[str, Payload]]] = field(default_factory=list)

    def install(self, monkeypatch) -> None:
        assignment, outcome, save = wire.encode_assignment, wire.encode_outcome, ClientStore.save

        def copied(payload: Payload) -> Payload:
            return Payload({n: t.clone() for n, t in payload.tensors.items()}, payload.meta)

        def encode_assignment(a, **how):
            self.down.append((a.client, a.round, a.kind, copied(a.payload)))
            return assignment(a, **how)

        def encode_outcome(o, **how):
            if isinstance(o, Update):
                self.up.append((o.client, o.round, copied(o.payload)))
            return outcome(o, **how)

        def keep(store, client, round, state):
            self.kept.append((client, round, {s: copied(p) for s, p in state.items()}))
            return save(store, client, round, state)

        monkeypatch.setattr(wire, "encode_assignment", encode_assignment)
        monkeypatch.setattr(wire, "encode_outcome", encode_outcome)
        monkeypatch.setattr(ClientStore, "save", keep)


@pytest.mark.parametrize("name", ALL)
def test_nothing_that_a_client_keeps_is_in_any_message(name, whole):
    spy = whole.spy
    # What an algorithm without personal models keeps may have been sent: SCAFFOLD's last change until it is counted.
    private = {"optimizer", "personal"} if properties(name).personal else {"optimizer"}
    states = [state[section] for _, _, state in spy.kept for section in private & state.keys()]
    kept = [t for payload in states for t in payload.tensors.values() if t.any()]
    travelled = [t for *_, payload in (*spy.down, *spy.up) for t in payload.tensors.values()]
    assert len(kept) >= 6 or name in ZEROTH_ORDER  # at least the optimiser's state, where there is an optimiser
    for secret in kept:
        assert not [t for t in travelled if t.shape == secret.shape and secret.numel() > 1 and torch.equal(t, secret)]
    assert {c for c, *_ in spy.up} == {c for c, *_ in spy.down}
    if properties(name).personal:
        assert any(state["personal"].tensors for _, _, state in spy.kept)


# ------------------------------------------------------------------ what the server takes


def one_round(setting: Setting) -> tuple[dict[str, Payload], list[Update]]:
    """Each client's personal state and update after a first round, played by hand through the interface."""
    server, cls = setting.algorithm, type(setting.algorithm)
    client = cls(server.options, server.seed, server.adapter)
    kept, updates = {}, []
    for name in setting.schedule.training:
        payload = server.initial_payload(name)
        client.client_model(setting.models, payload)
        client.begin(name, 1, None)
        client.receive(payload)
        shard = setting.data.client(name)
        steps = [
            [collate([shard.sequences[i] for i in p], packed=True, pad=0, examples=p) for p in passes]
            for passes in round_indices(shard.train, Plan(2, steps=2), 1, 0, name)
        ]
        client.local_training(LocalRun(client.model, partial(iter, steps), setting.recipe.train, 0, 2))
        shared = client.shared_state()
        payload = Payload({n: t.clone() for n, t in shared.tensors.items()}, shared.meta)
        updates.append(Update(name, 1, payload, len(shard.train), shard.sequences.supervised_tokens(shard.train)))
        kept[name] = from_bytes(to_bytes(client.client_state()))
    return kept, updates


Played = tuple[Algorithm, dict[str, Payload], list[Update], Callable[[], Algorithm]]
PLAYED: dict[str, Played] = {}


def play(name: str, tiny_recipe: Callable[..., Recipe]) -> Played:
    """The server after a first round, its clients' states and updates, and what makes another server. Made once."""
    if name not in PLAYED:
        setting = prepare(tiny_recipe({**of(name)}), Watch())
        kept, updates = one_round(setting)

        def fresh() -> Algorithm:
            made = setting.algorithm
            algorithm = type(made)(made.options, made.seed, made.adapter)
            algorithm.server_model(setting.models)
            return algorithm

        PLAYED[name] = setting.algorithm, kept, updates, fresh
    return PLAYED[name]


@pytest.fixture
def played(name, tiny_recipe) -> tuple[Algorithm, list[Update], Callable[[], Algorithm]]:
    algorithm, _, updates, fresh = play(name, tiny_recipe)
    return algorithm, updates, fresh


def aggregated(algorithm: Algorithm, updates: list[Update]) -> torch.Tensor:
    once: Iterator[Update] = iter(updates)  # may be read once
    algorithm.aggregate(once)
    algorithm.server_step()
    return algorithm.deployed().adapter.flat.double()


@pytest.mark.parametrize("name", ["fedavg", "global", "fedprox", "ditto"])
def test_a_plain_mean_is_linear_in_what_clients_send(name, played):
    _, updates, fresh = played
    draw = torch.Generator().manual_seed(0)
    others = [
        replace(u, payload=Payload({n: torch.randn(t.shape, generator=draw) for n, t in u.payload.tensors.items()}))
        for u in updates
    ]

    def mixed(a: float, b: float) -> list[Update]:
        return [
            replace(u, payload=Payload({n: a * t + b * v.payload.tensors[n] for n, t in u.payload.tensors.items()}))
            for u, v in zip(updates, others, strict=True)
        ]

    one, two = aggregated(fresh(), updates), aggregated(fresh(), others)
    for a, b in ((1.0, 1.0), (2.0, 0.0), (-0.5, 3.0)):
        assert torch.allclose(aggregated(fresh(), mixed(a, b)), a * one + b * two, atol=1e-5)
    assert not torch.allclose(one, two)


# ------------------------------------------------------------------ the base-delta channel, end to end


def held_out_loss(setting: Setting, model) -> float:
    test = [i for shard in setting.found.clients.shards.values() for i in shard.test]
    total, tokens = loss_sums(model, setting.data.sequences, test, batch_size=4, packed=True)
    return total / tokens


def test_after_one_round_merging_into_the_base_is_fedavg(tiny_recipe, tmp_path):
    """Merging changes where the change is kept and not what the model does."""
    values = {"federation.rounds": 1, "train.lr": 0.05}
    merged = fedloom.run(tiny_recipe({"algorithm": "test-merging", **values}), out=tmp_path / "merging")
    averaged = fedloom.run(tiny_recipe({"algorithm": "fedavg", **values}), out=tmp_path / "fedavg")
    assert merged.summary["loss"]["after"] == pytest.approx(averaged.summary["loss"]["after"], abs=1e-5)
    assert merged.summary["loss"]["after"] < merged.summary["loss"]["before"] - 0.05
    adapter = load_tensors(tmp_path / "merging" / "adapter" / "adapter_model.safetensors")
    assert not any(t.any() for n, t in adapter.items() if ".lora_B." in n)


def test_a_base_delta_travels_and_is_deployed_saved_and_loaded(tiny_recipe, tmp_path, monkeypatch):
    spy = Wire()
    spy.install(monkeypatch)
    recipe = tiny_recipe({"algorithm": "test-merging", "train.lr": 0.05})
    outcome = fedloom.run(recipe, out=tmp_path / "run")
    weight = "model.layers.0.self_attn.q_proj.weight"
    ranks = {r: p.tensors[f"delta/{weight}.B"].shape[1] for _, r, k, p in spy.down if k == "train" and r > 1}
    assert ranks == {2: 2}  # round 2's clients get round 1's change, of rank 2
    delta = load_tensors(tmp_path / "run" / "adapter" / "base_delta.safetensors")
    assert delta[f"{weight}.B"].shape[1] == 4  # two rounds of rank 2

    setting = prepare(recipe, Watch())
    loaded = load_adapted(recipe.model, tmp_path / "run" / "adapter", "cpu")
    assert held_out_loss(setting, loaded) == pytest.approx(outcome.summary["loss"]["after"], abs=1e-5)
    # the same by hand: plain weights plus the product, without any adapter
    plain = setting.model
    parameters = {n.replace(".base_layer", ""): p for n, p in plain.base.model.named_parameters()}
    assert held_out_loss(setting, plain) == pytest.approx(outcome.summary["loss"]["before"], abs=1e-5)
    for name in {n[:-2] for n in delta}:
        parameters[name].data += delta[f"{name}.B"] @ delta[f"{name}.A"]
    assert held_out_loss(setting, plain) == pytest.approx(outcome.summary["loss"]["after"], abs=1e-5)
