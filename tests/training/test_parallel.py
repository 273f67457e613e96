"""Several ranks are one client: who does what of a step, what is summed, and every algorithm's update as one process makes it.

The ranks are threads here (helpers/together.py); tests/runtimes/ranks/test_pool.py has them as processes.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.algorithms.averaging.fedavg import FedAvg
from fedloom.algorithms.base import Algorithm
from fedloom.algorithms.build import make
from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.federation.checks import check_algorithm
from fedloom.federation.client import Client
from fedloom.federation.record.checkpoints import ClientStore
from fedloom.federation.runtime import Capabilities
from fedloom.messages.types import Update
from fedloom.models.attach import Models
from fedloom.models.layout import Layout
from fedloom.runtimes.simulator import Simulator
from fedloom.training.parallel import Ranks, bystander, deal
from tests.helpers.federation import Federation
from tests.helpers.together import Meeting, together

#: Eight examples in steps of seven: the ranks' parts are uneven, and in the second step one rank has nothing.
UNEVEN = {"train.epochs": 1, "train.batch_size": 7, "train.lr": 5e-3, "train.eps": 1e-4, "adapter.rank": 2}


@pytest.fixture(autouse=True)
def _quick(loading_once, no_waiting, no_reports):
    pass


# ------------------------------------------------------------------ who does what


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(2, 5), st.integers(1, 6))
def test_every_example_is_dealt_once_and_ranks_have_alike(lengths, ranks, batch_size):
    hands = deal(lengths, ranks, batch_size)
    assert sorted(i for hand in hands for i in hand) == list(range(len(lengths)))
    assert len(hands) % ranks == 0, "each rank has as many passes as the others"
    assert max(len(hand) for hand in hands) <= batch_size
    parts = [[i for hand in hands[rank::ranks] for i in hand] for rank in range(ranks)]
    counts = [len(p) for p in parts]
    assert max(counts) - min(counts) <= 1
    tokens = [sum(lengths[i] for i in p) for p in parts]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_a_rank_takes_its_own_passes_and_goes_along_only_where_it_must(tiny_recipe, tmp_path):
    data = Federation(tiny_recipe(), tmp_path).setting.data.client("copy")
    empty = bystander(data.sequences[data.train[0]], packed=True, pad=0)
    assert (empty.tokens, empty.units, empty.examples) == (1, 0, ())
    full = [object.__new__(type(empty)) for _ in range(3)]
    for number, batch in enumerate(full):
        batch.__dict__["examples"] = (number,)
    passes = [*full, empty]
    assert Ranks().own(passes) is passes
    assert Ranks(0, 2).own(passes) == [full[0], full[2]]
    assert Ranks(1, 2).own(passes) == [full[1]]
    assert Ranks(1, 2, sharded=True).own(passes) == [full[1], empty]


def test_ranks_draw_masks_of_their_own():
    assert Ranks().stream("a") == Ranks(0, 2).stream("a") == "a"
    assert len({Ranks(r, 3).stream("a") for r in range(3)}) == 3


# ------------------------------------------------------------------ the same update


def process(federation, models, ranks=None, folder="clients"):
    """A client's process with a base of its own."""
    s = federation.setting
    more = {} if ranks is None else {"ranks": ranks}
    store = ClientStore(federation.folder / folder)
    return Client(models, s.data, s.template, store, federation.folder / "adapters", s.found.suite, **more)


def own_models(recipe):
    return Models(recipe.model, recipe.adapter, recipe.seed)


def both(recipe, folder, meeting=None, client="copy"):
    """(one process's update, that of two ranks) for the same assignment."""
    federation = Federation(recipe, folder)
    meeting = meeting or Meeting(2)
    alone = federation.process(own_models(recipe))
    assignment = federation.assignment("train", client, 1)
    first = federation.send(assignment, alone)
    models = [own_models(recipe) for _ in range(meeting.count)]
    for each in models:  # loading and fresh adapters draw from the process's own generator: not in threads
        make(federation.recipe).client_model(each, assignment.payload)
    outcomes = together(
        lambda ranks: process(federation, models[ranks.rank], ranks, "together").handle(assignment), meeting
    )
    return first, outcomes[0], federation


def agree(one, other, absolute=1e-5):
    assert isinstance(one, Update), one
    assert isinstance(other, Update), other
    assert sorted(one.payload.tensors) == sorted(other.payload.tensors)
    for name, tensor in one.payload.tensors.items():
        apart = (tensor.double() - other.payload.tensors[name].double()).abs().max()
        assert float(apart) <= absolute, (name, float(apart))
    assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], abs=1e-5, rel=0)
    assert (one.num_examples, one.num_tokens, one.cost.steps) == (
        other.num_examples, other.num_tokens, other.cost.steps,
    )  # fmt: skip


def moved(update, federation):
    """How far what is sent lies from what was received; from nothing, where that is something else."""
    got = federation.messages[0].down.tensors
    sent = update.payload.tensors
    starts = {n: got[n].double() if n in got and got[n].shape == t.shape else 0.0 for n, t in sent.items()}
    return max(float((t.double() - starts[n]).abs().max()) for n, t in sent.items())


def rankable(name):
    cls = registry.algorithms.get(name)
    return bool(cls.strategies()) and not cls.properties.offsite


@pytest.mark.parametrize("name", registry.algorithms.names())
def test_every_algorithm_sends_what_one_process_would_or_is_refused(tiny_recipe, tmp_path, name):
    fields = registry.algorithms.get(name).Options.model_fields
    options = {key: value for key, value in {"epsilon": 0.05, "bases": 64}.items() if key in fields}
    recipe = tiny_recipe({"algorithm": {"name": name, **options}}, **UNEVEN)
    if not rankable(name):
        with pytest.raises(UserError, match=r"runtime\.ranks=2"):
            check_algorithm(tiny_recipe({"algorithm": name}, **{"runtime.ranks": 2}))
        return
    check_algorithm(recipe.with_values({"runtime.ranks": 2}))
    one, other, federation = both(recipe, tmp_path, client="all-clients" if name == "global" else "copy")
    agree(one, other)
    assert one.cost.train_tokens == other.cost.train_tokens
    if one.payload.tensors:  # `local` sends nothing
        assert moved(one, federation) > 1e-4, "something was learned, or the comparison would be idle"


@pytest.mark.parametrize(
    "overrides",
    [
        {"adapter": {"method": "adalora", "rank": 2, "target_modules": ["q_proj"]}},
        {"adapter": {"method": "full"}},
        {"adapter": {"method": "prompt_tuning", "virtual_tokens": 3}, "train.packing": "off"},
        {
            "train.optimizer": "sgd",
            "train.lr": 0.05,
            "train.clip": 0.05,
            "train.accumulation": 2,
            "train.batch_size": 2,
        },
    ],
    ids=["adalora", "full", "padded prompt", "clipped sgd"],
)
def test_methods_and_optimisers_too(tiny_recipe, tmp_path, overrides):
    values = {k: v for k, v in UNEVEN.items() if k != "adapter.rank"} | overrides
    one, other, federation = both(tiny_recipe(values), tmp_path)
    agree(one, other)
    assert moved(one, federation) > 1e-4


def test_three_ranks_with_less_to_do_than_ranks(tiny_recipe, tmp_path):
    recipe = tiny_recipe(UNEVEN | {"train.batch_size": 2})
    one, other, _ = both(recipe, tmp_path, Meeting(3))
    agree(one, other)


def test_a_rank_without_examples_that_goes_along_changes_nothing(tiny_recipe, tmp_path):
    """As a sharded base wants it; its passes count a token each, and no loss."""
    one, other, _ = both(tiny_recipe(UNEVEN), tmp_path, Meeting(2, sharded=True))
    agree(one, other)
    assert other.cost.train_tokens == one.cost.train_tokens + 1


def test_only_the_gradient_of_what_trains_is_exchanged(tiny_recipe, tmp_path):
    meeting = Meeting(2)
    one, _, federation = both(tiny_recipe(UNEVEN), tmp_path, meeting)
    numel = Layout({n: t.shape for n, t in one.payload.tensors.items()}).numel
    assert meeting.sizes == [numel] * one.cost.steps
    assert numel == federation.server.shared.layout.numel


def test_only_the_first_rank_keeps_state(tiny_recipe, tmp_path, monkeypatch):
    saved = []
    save = ClientStore.save
    monkeypatch.setattr(ClientStore, "save", lambda self, *a: (saved.append(self.folder.name), save(self, *a)))
    both(tiny_recipe(UNEVEN | {"train.optimizer_state": "keep"}), tmp_path)
    assert saved == ["clients", "together"]


# ------------------------------------------------------------------ refusals


class Walking(FedAvg):
    """A plug-in with a loop of its own, which says nothing of ranks."""

    def local_training(self, run):
        for _ in run.steps():
            pass
        return run.fit(self)


class Single(Simulator):
    """A plug-in whose clients are one process each."""

    capabilities = Capabilities()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"algorithm": "walking"}, "a training loop of its own"),
        ({"algorithm": "flora", "runtime.parallel": "fsdp"}, "use runtime.parallel=ddp"),
        ({"adapter": {"method": "full"}, "runtime.parallel": "fsdp"}, "adapter.method=full trains weights of it"),
        ({"algorithm": "fedot"}, "sent an emulator once"),
        ({"runtime.name": "single"}, "runtime.name=single, whose clients are single processes"),
        ({"runtime.ranks": 1, "runtime.parallel": "ddp"}, "but runtime.ranks=1"),
    ],
)
def test_what_ranks_cannot_do_is_refused_with_a_sentence(tiny_recipe, monkeypatch, overrides, words):
    monkeypatch.setitem(registry.algorithms._targets, "walking", Walking)
    monkeypatch.setitem(registry.runtimes._targets, "single", Single)
    with pytest.raises(UserError, match=words):
        check_algorithm(tiny_recipe({"runtime.ranks": 2, **overrides}))


def test_an_algorithm_without_a_loop_of_its_own_needs_no_declaration():
    assert FedAvg.strategies() == Algorithm.strategies() == {"ddp", "fsdp"}
    assert Walking.strategies() == frozenset()
