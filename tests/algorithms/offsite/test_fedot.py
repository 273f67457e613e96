"""FedOT: tuning around an emulator, plugged back by name; clients that have nothing but the server's message."""

from __future__ import annotations

import gc
import io
import json
import time
import weakref
from functools import partial

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fedloom
from fedloom.algorithms.averaging import fedavg
from fedloom.algorithms.offsite.fedot import FedOT
from fedloom.cli.console import result_table
from fedloom.common import registry
from fedloom.common.errors import ClientFailed, UserError
from fedloom.data.batching import Plan, round_indices
from fedloom.evaluation.suites import Suite
from fedloom.experiment import run as experiment
from fedloom.experiment.evaluate import evaluate
from fedloom.experiment.prepare import prepare
from fedloom.federation.watch import Watch
from fedloom.messages.at_rest import from_bytes, to_bytes
from fedloom.messages.types import Failure
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.emulator.distillation import align
from fedloom.models.layout import Adapter
from fedloom.models.loading import load_base
from fedloom.recipe.recipe import ModelConfig
from fedloom.reporting.export import export_run
from fedloom.reporting.html import report_many, write_report
from tests.helpers import tiny
from tests.helpers.federation import Federation

FULL = {"adapter": {"method": "full"}, "train.lr": 3e-3}
FIVE = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "full_tuned")
METHODS = pytest.mark.parametrize("method", [{}, FULL], ids=["lora", "full"])
DROPPING = {"name": "fedot", "bottom": 1, "top": 1, "drop": 0.5, "reference": False}


@pytest.fixture(scope="session")
def six_layers(tmp_path_factory):
    return tiny.save_model(
        tmp_path_factory.mktemp("six"), tiny.causal_lm(num_hidden_layers=6, tie_word_embeddings=True)
    )


@pytest.fixture(scope="session")
def public(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("public") / "rows.jsonl", 24, seed=9)


@pytest.fixture
def recipe(tiny_recipe, six_layers, public):
    """``recipe({"drop": 0.2}, {"train.lr": 1e-3})``: options of fedot, then keys of the recipe."""

    def make(options=None, *overrides, **more):
        values = {"model": str(six_layers), "split.splitter": "uniform", "split.num_clients": 2}
        for o in overrides:
            values |= o
        section = {**DROPPING, **(options or {})}
        if "align" in section and section["align"] is not None:
            section["align"] = {"path": str(public), "template": "plain", "steps": 2, "lr": 1e-3, **section["align"]}
        return tiny_recipe({**values, "algorithm": section, **more})

    return make


@pytest.fixture
def federation(recipe, tmp_path):
    return lambda *arguments, **more: Federation(recipe(*arguments, **more), tmp_path / "federation")


# ------------------------------------------------------------------ the untouched middle


class OuterByHand(fedavg.FedAvg):
    """Plain FedAvg on the full model, whose first and last layer alone were told to train."""

    def server_model(self, models):
        model = models.base().model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("model.layers.0.", "model.layers.5.")))
        models._adapted = models._adapted or AdaptedModel(model, models.base())
        return super().server_model(models)


def files(folder):
    return {p.name: load_file(str(p)) for p in sorted((folder / "adapter").glob("*.safetensors"))}


def same_tensors(a, b):
    return a.keys() == b.keys() and all(
        a[f].keys() == b[f].keys() and all(torch.equal(t, b[f][n]) for n, t in a[f].items()) for f in a
    )


@METHODS
def test_with_nothing_dropped_the_plug_in_is_ordinary_fine_tuning_bit_for_bit(recipe, tmp_path, monkeypatch, method):
    monkeypatch.setitem(registry.algorithms._targets, "outer-by-hand", OuterByHand)
    pattern = {"adapter.target_modules": r"model\.layers\.[05]\..*_proj"}
    plain = "outer-by-hand" if method else "fedavg"
    ordinary = fedloom.run(
        recipe({}, method, {} if method else pattern).with_values({"algorithm": {"name": plain}}), tmp_path / "a"
    )
    offsite = fedloom.run(recipe({"drop": 0.0, "reference": True}, method), tmp_path / "b")
    assert offsite.summary["adapter_sha256"] == ordinary.summary["adapter_sha256"]
    assert same_tensors(files(tmp_path / "b"), files(tmp_path / "a"))
    five = {n: v["loss"] for n, v in offsite.summary["offsite"].items() if n in FIVE}
    before, after = (ordinary.summary["loss"][k] for k in ("before", "after"))
    assert after < before
    # Who measures puts other examples together, which rounds differently.
    assert five == {n: pytest.approx(before if "zero_shot" in n else after, abs=1e-5) for n in FIVE}
    reference = json.loads((tmp_path / "b" / "reference" / "summary.json").read_text())
    assert reference["algorithm"] == "fedavg_outer"
    assert reference["adapter_sha256"] == ordinary.summary["adapter_sha256"]


# ------------------------------------------------------------------ plugging back by name


@METHODS
def test_what_was_tuned_lands_on_its_own_name_and_nothing_else_changes(recipe, tmp_path, six_layers, method):
    result = fedloom.run(recipe({}, method), tmp_path / "run")
    merged = export_run(tmp_path / "run", "merged", tmp_path / "merged", None)
    before = dict(load_base(ModelConfig(name=str(six_layers))).model.named_parameters())
    after = dict(load_base(ModelConfig(name=str(merged))).model.named_parameters())
    assert after.keys() == before.keys()
    outer = {n for n in before if n.startswith(("model.layers.0.", "model.layers.5."))}
    unchanged = {n for n in before if torch.equal(before[n], after[n])}
    assert unchanged >= before.keys() - outer
    if method:
        assert unchanged == before.keys() - outer
        shared = files(tmp_path / "run")["model.safetensors"]
        assert all(torch.equal(after[n], shared[n]) for n in outer)
    else:
        assert unchanged == (before.keys() - outer) | {n for n in outer if "norm" in n}
    measured = evaluate(str(tmp_path / "run"), None, {}, None)
    assert measured["loss"] == pytest.approx(result.summary["offsite"]["plug_in"]["loss"], abs=1e-5)
    asked = result.tokenizer(["copy: ant bee"], return_tensors="pt")
    assert result.model.generate(**asked, max_new_tokens=3, do_sample=False).shape[1] == asked["input_ids"].shape[1] + 3


def test_a_clients_step_is_that_of_a_shallow_model_mapped_back_by_hand(federation, six_layers):
    """A four-layer Llama made of layers 0, 1, 4 and 5, one step of plain SGD by torch, and its layer 3 is our layer 5."""
    sgd = {
        "train.steps": 1,
        "train.optimizer": "sgd",
        "train.lr": 0.1,
        "train.clip": None,
        "train.schedule": "constant",
    }
    f = federation({}, FULL, sgd)
    assert f.server.cut.kept == (1, 4)
    places = {0: 0, 1: 1, 2: 4, 3: 5}
    full = dict(load_base(ModelConfig(name=str(six_layers))).model.named_parameters())
    shallow = tiny.causal_lm(num_hidden_layers=4, tie_word_embeddings=True)

    def original(name):
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(places[int(parts[2])])
        return ".".join(parts)

    with torch.no_grad():
        for name, parameter in shallow.named_parameters():
            parameter.copy_(full[original(name)])
    client = f.clients[0]
    data = f.setting.data.client(client)
    ((indices,),) = round_indices(data.train, Plan(2, steps=1), 1, f.recipe.seed, client)
    losses, tokens = [], 0
    for i in indices:
        s = data.sequences[i]
        ids = torch.from_numpy(s.ids.astype("int64"))
        logits = shallow(ids[None]).logits[0, s.prompt - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[s.prompt :], reduction="sum"))
        tokens += s.supervised
    (sum(losses) / tokens).backward()
    update = f.train(client, 1).payload.tensors
    expected = {original(n): p - 0.1 * p.grad for n, p in shallow.named_parameters()}
    assert update.keys() == {n for n in expected if n.startswith(("model.layers.0.", "model.layers.5."))}
    for name, tensor in update.items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
        assert not torch.equal(tensor, full[name])


# ------------------------------------------------------------------ what leaves the server


def kept_from_clients(model_folder, dropped):
    weights = dict(load_base(ModelConfig(name=str(model_folder))).model.named_parameters())
    return {
        n: p
        for n, p in weights.items()
        if n.startswith(tuple(f"model.layers.{i}." for i in dropped)) and "norm" not in n
    }


@METHODS
def test_a_client_without_the_model_works_from_its_message_alone(federation, six_layers, tmp_path, monkeypatch, method):
    f = federation({}, method)
    monkeypatch.setenv("FEDLOOM_HOME", str(tmp_path / "empty"))
    nowhere = Models(ModelConfig(name=str(tmp_path / "no-such-model")), f.recipe.adapter, f.recipe.seed)
    alone = f.process(nowhere)
    monkeypatch.setattr("fedloom.models.attach.load_base", None)  # whoever loads a base fails
    first, second = f.clients
    update = f.send(f.assignment("train", first, 1), alone)
    assert not isinstance(update, Failure)
    f.store.folder = tmp_path / "other"  # the second process starts afresh
    measured = f.send(f.assignment("evaluate", second, 0), alone)
    assert not isinstance(measured, Failure) and measured.metrics["tokens"] > 0
    assert nowhere._base is None and not (tmp_path / "empty").exists()

    secret = kept_from_clients(six_layers, f.server.cut.dropped)
    assert f.server.cut.dropped == (2, 3) and len(secret) == 14
    travelled = [t for m in f.messages for p in (m.down, m.up) if p for t in p.tensors.values()]
    assert not any(t.shape == s.shape and torch.equal(t, s) for t in travelled for s in secret.values())
    middle = kept_from_clients(six_layers, (1, 4))
    assert all(any(t.shape == s.shape and torch.equal(t, s) for t in travelled) for s in middle.values())
    assert not any(".2." in n or ".3." in n for m in f.messages for n in m.down.tensors if ".layers." in n)


@METHODS
def test_the_middle_and_the_frozen_parts_travel_in_the_first_message_alone(federation, method):
    f = federation({}, method)
    f.round(1)
    f.round(2)
    first, later = f.messages[0], f.messages[2]
    assert {n.split("/")[0] for n in first.down.tensors if "/" in n} == {"emulator", "frozen", "file"}
    assert not any("/" in n for n in later.down.tensors)
    assert later.down.tensors.keys() == first.up.tensors.keys() == f.server.shared.views.keys()
    names = [n for n in first.down.tensors if n.startswith("frozen/")]
    assert "frozen/model.embed_tokens.weight" in names and "frozen/lm_head.weight" not in names  # tied: once
    assert any(n.startswith("frozen/model.layers.0.") for n in names) == (not method)
    assert not any("embed" in n or "model.norm" in n or "lm_head" in n for n in first.up.tensors)


@pytest.mark.parametrize(
    "options",
    [
        {"drop": 0.0},
        {"emulator": "quantize", "bits": 8},
        {"emulator": "quantize", "bits": 4},
        {"emulator": "low_rank", "keep_rank": 0.25},
        {"emulator": "quantize", "bits": 4, "drop": 0.5},
    ],
    ids=str,
)
def test_bytes_of_a_compressed_middle_are_counted_on_the_wire(federation, options):
    f = federation({"drop": None, **options})
    f.train(f.clients[0], 1)
    message = f.messages[0]
    sizes = {n: t.nbytes for n, t in message.down.tensors.items()}
    middle = sum(s for n, s in sizes.items() if n.startswith("emulator/"))
    assert sum(sizes.values()) < message.down_bytes < sum(sizes.values()) + 25_000  # and a header of names
    plain = 4 * sum(
        p.numel() for n, p in f.model.base.model.named_parameters() if n[:15] in f.server.cut.prefixes(range(1, 5))
    )
    share = {"8": 0.30, "4": 0.17}.get(str(options.get("bits")), 0.62) if options != {"drop": 0.0} else 1.0
    share *= 0.5 if "emulator" in options and options.get("drop") else 1.0
    assert middle == plain if share == 1.0 else 0.5 * share * plain < middle < share * plain
    left = f.server.left_server()
    adapter = sum(t.nbytes for t in f.server.shared.tensors().values())
    files = sum(s for n, s in sizes.items() if n.startswith("file/"))
    assert left["bytes"] == sum(sizes.values()) - files - adapter
    assert left["parameters_of_model"] == sum(
        p.numel() for n, p in f.model.base.model.named_parameters() if "lora" not in n
    )
    assert left["parameters"] <= left["parameters_of_model"]


def test_clients_compute_with_what_the_server_renders(federation):
    for options in ({"emulator": "quantize", "bits": 4}, {"emulator": "low_rank"}):
        f = federation({"drop": None, **options})
        f.train(f.clients[0], 1)
        server, live = f.server, f.client._model.base_weights()
        rendered = server.compression.render(server.compression.latents(server._middle()))
        assert rendered and all(torch.equal(live[n], w) for n, w in rendered.items())
        assert not torch.equal(
            live["model.layers.2.mlp.up_proj.weight"], server._middle()["model.layers.2.mlp.up_proj.weight"]
        )


# ------------------------------------------------------------------ alignment


def test_fedot_aligns_once_before_anything_travels_and_a_resumed_server_does_not_again(recipe, federation):
    f = federation({"align": {}})
    f.round(1)
    assert f.server.version == 1 and f.server.aligned[1] < f.server.aligned[0]
    aligned = {n: t.clone() for n, t in f.server.latents.items()}
    f.round(2)
    assert f.server.version == 1 and all(torch.equal(f.server.latents[n], t) for n, t in aligned.items())
    assert not torch.equal(
        aligned["model.layers.4.mlp.up_proj.weight"], f.server._middle()["model.layers.4.mlp.up_proj.weight"]
    )
    live = f.client._model.base_weights()
    assert all(torch.equal(live[n], t) for n, t in aligned.items())

    state = from_bytes(to_bytes(f.server.server_state()))
    fresh = prepare(recipe({"align": {}}), Watch()).algorithm
    fresh._aligner.align = None  # must not be asked
    fresh.load_server_state(state)
    again = fresh.server_state()
    assert again.meta == state.meta and all(torch.equal(t, state.tensors[n]) for n, t in again.tensors.items())


@pytest.mark.parametrize(
    "other",
    [{"steps": 3}, {"lr": 2e-3}, {"batch_size": 2}, {"max_length": 24}, {"limit": 6}, {"kl": 1.0}, {"layerwise": True}],
    ids=str,
)
def test_alignment_heeds_each_of_its_own_settings(recipe, other):
    assert not same_latents(latents_of(recipe({"align": {}})), latents_of(recipe({"align": other})))


def test_alignment_heeds_nothing_of_the_clients_settings(recipe, tmp_path):
    others = {"train.lr": 0.5, "train.batch_size": 7, "train.steps": 5, "data.max_length": 40, "data.limit": 30}
    assert same_latents(latents_of(recipe({"align": {}})), latents_of(recipe({"align": {}}, others)))
    elsewhere = tiny.write_rows(tmp_path / "other.jsonl", 24, seed=77)
    assert not same_latents(latents_of(recipe({"align": {}})), latents_of(recipe({"align": {"path": str(elsewhere)}})))


def latents_of(made):
    algorithm = prepare(made, Watch()).algorithm
    algorithm.server_state()
    return algorithm.latents


def same_latents(a, b):
    return all(torch.equal(t, b[n]) for n, t in a.items())


BIOT = {"name": "fedbiot", "align": {}}


def test_fedbiot_sends_each_new_emulator_once_and_clients_train_with_it(federation):
    f = federation(BIOT, {"federation.rounds": 3})
    for number in (1, 2):
        f.round(number)
        f.evaluate(f.clients[0], number)
        f.evaluate(f.clients[0], number)
    carried = [any(n.startswith("emulator/") for n in m.down.tensors) for m in f.messages]
    #          round 1      evaluations   round 2      evaluations
    assert carried == [True, True, True, False, False, True, True, False]
    assert f.server.version == 3
    live = f.client._model.base_weights()
    assert all(torch.equal(live[n], t) for n, t in f.server.latents.items())


def test_fedbiot_aligns_with_this_rounds_layers_on_further_examples(federation):
    f = federation(BIOT, {"train.lr": 0.1})
    server, aligner = f.server, f.server._aligner
    server.aggregate(iter([f.train(c, 1) for c in f.clients]))
    before = {n: t.clone() for n, t in server.latents.items()}
    server.server_step()

    def by_hand(adapter):
        latents = {n: t.clone() for n, t in before.items()}
        f.model.adapter.copy_(adapter)
        align(f.model, server.cut, server.compression, latents, aligner.batches(2, True), aligner.settings)
        return latents

    assert same_latents(server.latents, by_hand(server.shared.flat))
    assert not same_latents(server.latents, by_hand(f.model.initial))
    first, second = ({i for b in aligner.batches(n, True) for i in b.examples} for n in (1, 2))
    assert len(first) == len(second) == 8 and not first & second


def test_a_client_that_missed_an_emulator_says_so(federation):
    f = federation(BIOT)
    f.round(1)
    lost = f.server.round_payload(f.clients[0])  # never arrives
    assert any(n.startswith("emulator/") for n in lost.tensors)
    outcome = f.send(f.assignment("train", f.clients[0], 2))
    assert isinstance(outcome, Failure) and outcome.reason == "stale_emulator"
    with pytest.raises(ClientFailed, match="emulator 2 and this client at 1"):
        f.client._algorithm.receive(f.server.round_payload(f.clients[0]))


def test_fedbiot_holds_clients_near_the_broadcast(federation):
    """With lr · μ = 1 each step of SGD first goes all the way back: four steps move as far as one."""
    sgd = {
        "train.lr": 1e-2,
        "train.optimizer": "sgd",
        "train.clip": None,
        "train.steps": 4,
        "train.schedule": "constant",
    }
    moved = {}
    for mu in (0.0, 100.0):
        f = federation({**BIOT, "mu": mu}, sgd)
        start = f.server.shared.flat.clone()
        update = f.train(f.clients[0], 1)
        moved[mu] = float((Adapter.of(update.payload.tensors).flat - start).norm())
    assert 0 < moved[100.0] < 0.5 * moved[0.0]


# ------------------------------------------------------------------ five numbers


def test_the_five_numbers(recipe, tmp_path, six_layers):
    cut = {"bottom": 2, "drop": 0.34}
    result = fedloom.run(recipe({**cut, "reference": True}), tmp_path / "run")
    five, summary = result.summary["offsite"], result.summary
    once = {"federation.rounds": 1, "algorithm": {"name": "fedavg"}}
    plain = fedloom.run(recipe().with_values(once), tmp_path / "plain").summary
    assert plain["offsite"] is None
    assert five["full_zero_shot"]["loss"] == summary["loss"]["before"]
    assert five["full_zero_shot"]["loss"] == pytest.approx(plain["loss"]["before"], abs=1e-6)  # other batches: rounding
    assert five["plug_in"]["loss"] == summary["loss"]["after"] < summary["loss"]["before"]
    # The emulator before training: a shallow model made by hand, measured by a plain run.
    shallow = AutoModelForCausalLM.from_pretrained(six_layers)
    shallow.model.layers = torch.nn.ModuleList(shallow.model.layers[i] for i in (0, 1, 2, 4, 5))
    shallow.config.num_hidden_layers = 5
    tiny.save_model(tmp_path / "shallow", shallow)
    by_hand = fedloom.run(recipe().with_values({**once, "model": str(tmp_path / "shallow")}), tmp_path / "hand").summary
    assert five["emulator_zero_shot"]["loss"] == pytest.approx(by_hand["loss"]["before"], abs=1e-6)
    assert five["emulator_tuned"]["loss"] < five["emulator_zero_shot"]["loss"]
    outer = recipe().with_values({"algorithm": {"name": "fedavg_outer", "bottom": 2, "top": 1}})
    assert five["full_tuned"]["loss"] == fedloom.run(outer, tmp_path / "outer").summary["loss"]["after"]  # bit for bit
    page = write_report(result.folder).read_text()
    for name in ("Full model, before", "Emulator, before", "Emulator, tuned", "Plugged into the full model"):
        assert name in page
    assert f'value="{five["full_tuned"]["loss"]}"' in page and f'value="{five["emulator_tuned"]["loss"]}"' in page
    many = report_many([tmp_path / "run", tmp_path / "plain"], tmp_path / "many.html").read_text()
    assert many.count("Full model, tuned") == 1 and f'value="{five["plug_in"]["loss"]}"' in many
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result_table(summary))
    shown = console.export_text()
    assert f"{five['emulator_tuned']['loss']:.4f}" in shown and f"{five['full_tuned']['loss']:.4f}" in shown


class Killed(BaseException):
    pass


def test_a_run_killed_while_its_reference_trains_is_carried_on(recipe, tmp_path, monkeypatch):
    made = recipe({"reference": True})
    whole = fedloom.run(made, tmp_path / "whole").summary
    seen, emulators, build = [], [], FedOT.client_model

    def watched(self, models, payload):
        model = build(self, models, payload)
        emulators.append(weakref.ref(model.causal_lm))
        return model

    monkeypatch.setattr(FedOT, "client_model", watched)

    def tick(what, round, done, total):
        seen.append((what, round, done))
        if seen.count(("train", 2, 1)) == 2:  # the second run's second round
            gc.collect()
            assert len(emulators) == 1 and emulators[0]() is None  # let go of before the reference began
            raise Killed

    with pytest.raises(Killed):
        fedloom.run(made, tmp_path / "run", watch=Watch(tick=tick))
    assert not (tmp_path / "run" / "summary.json").exists() and (tmp_path / "run" / "reference").is_dir()
    resumed = fedloom.run(made, tmp_path / "run", resume=True).summary
    assert resumed["offsite"] == whole["offsite"]
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
    more = fedloom.run(made.with_values({"federation.rounds": 3}), tmp_path / "run", resume=True).summary
    assert more["rounds"] == 3
    assert json.loads((tmp_path / "run" / "reference" / "summary.json").read_text())["rounds"] == 3


def test_what_a_run_cost_is_without_the_reference_beside_it(recipe, tmp_path, monkeypatch):
    times = {}

    def timed(name, call, *arguments):
        times.setdefault(name, time.perf_counter())  # the first of each: the reference is assembled, too
        return call(*arguments)

    for name in ("assemble", "_reference"):
        monkeypatch.setattr(experiment, name, partial(timed, name, getattr(experiment, name)))
    summary = fedloom.run(recipe({"reference": True}), tmp_path / "run").summary
    assert summary["offsite"]["full_tuned"] is not None
    assert 0 < summary["cost"]["wall_seconds"] <= times["_reference"] - times["assemble"] + 1e-3  # it is rounded


def test_questions_are_answered_by_both_models_and_the_reference_can_be_left_out(recipe, tmp_path, monkeypatch):
    odd = Suite("odd", "generate", 4, lambda example, answer: len(answer) % 2 == 1, "an odd length")
    monkeypatch.setitem(registry.suites._targets, "odd", odd)
    scored = {"evaluation.suite": "odd", "evaluation.limit": 4, "federation.rounds": 1}
    summary = fedloom.run(recipe({}, scored), tmp_path / "run").summary
    five = summary["offsite"]
    assert all(
        0 <= five[n]["score"] <= 1 for n in ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in")
    )
    assert summary["score"]["questions"] > 0 and summary["score"]["after"] == five["plug_in"]["score"]
    assert five["full_tuned"] is None and "reference=false" in five["note"]
    assert not (tmp_path / "run" / "reference").exists()


# ------------------------------------------------------------------ refusals, before any work


@pytest.mark.parametrize(
    ("options", "overrides", "sentence"),
    [
        ({"bottom": 3, "top": 3}, {}, r"6 layers, but algorithm.bottom=3 and algorithm.top=3 .* need 7"),
        ({"bottom": 0, "top": 0}, {}, r"leave no layer to tune"),
        ({"emulator": "prune"}, {}, r"algorithm.emulator='prune' is not valid for fedot"),
        ({"drop": 1.0}, {}, r"algorithm.drop=1.0 is not valid"),
        ({"drop": 0.9}, {}, r"leaves 0 of the middle's 4 layers"),
        ({"bits": 4}, {}, r"algorithm.bits belongs to algorithm.emulator=quantize, not to drop_layers"),
        ({"emulator": "quantize", "bits": 3}, {}, r"algorithm.bits=3 is not valid"),
        ({"emulator": "low_rank", "keep_rank": 1.0}, {}, r"algorithm.keep_rank=1 makes factors"),
        ({}, {"adapter": {"method": "ia3"}}, r"fedot does not take adapter.method=ia3: it takes full, lora"),
        ({}, {"adapter": {"method": "full"}, "model.dtype": "bfloat16"}, r"must be float32"),
        ({}, {"adapter": {"target_modules": ["nothing"]}}, r"matches no linear layer in the layers that train"),
        ({"align": {"path": None}}, {}, r"algorithm.align names no data"),
        ({"align": {"path": "/no/such/file.jsonl"}}, {}, r"/no/such/file.jsonl"),
        ({"align": {"step": 3}}, {}, r"unknown option algorithm.align.step of fedot"),
        ({"name": "fedbiot"}, {}, r"fedbiot aligns its emulator on public data, but the recipe names none"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(recipe, tmp_path, options, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        fedloom.run(recipe(options, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_base_in_sixteen_bits_goes_with_lora(recipe, tmp_path):
    low = {"model.dtype": "bfloat16", "federation.rounds": 1}
    summary = fedloom.run(recipe({"emulator": "quantize", "drop": None}, low), tmp_path / "run").summary
    assert summary["failures"] == 0 and summary["loss"]["after"] < summary["loss"]["before"]
