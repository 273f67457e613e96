"""One run from a recipe to its report: what lies in the folder, what it cost, and that its numbers are true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedloom import Recipe, run
from fedloom.federation.record.checkpoints import Checkpoints
from fedloom.federation.record.events import SCHEMA, read_events
from fedloom.messages import wire
from fedloom.models.layout import Adapter
from tests.helpers import tiny

# Issue 2's own list of what summary.json has at least.
SUMMARY_KEYS = [
    "score.before", "score.after", "score.worst_client", "loss.before", "loss.after", "clients", "rounds",
    "adapter_sha256", "versions", "cost.upload_bytes", "cost.download_bytes", "cost.train_tokens", "cost.train_flops",
    "cost.wall_seconds", "cost.cpu_seconds", "cost.client_cpu_seconds", "cost.gpu_seconds", "cost.peak_memory_bytes", "cost.gpu_utilisation",
]  # fmt: skip


class Counted:
    """Every encoded message's length, noted beside the runtime's own count."""

    def __init__(self, monkeypatch):
        self.assignments: list[tuple[str, int]] = []
        self.outcomes: list[int] = []
        self.first: list[tuple[str, int]] = []  # of assignments that carry the recipe
        encode_assignment, encode_outcome = wire.encode_assignment, wire.encode_outcome

        def down(assignment, **how):
            message = encode_assignment(assignment, **how)
            self.assignments.append((assignment.kind, len(message)))
            if assignment.recipe is not None:
                self.first.append(self.assignments[-1])
            return message

        def up(outcome, **how):
            message = encode_outcome(outcome, **how)
            self.outcomes.append(len(message))
            return message

        monkeypatch.setattr(wire, "encode_assignment", down)
        monkeypatch.setattr(wire, "encode_outcome", up)

    @property
    def down(self):
        return sum(size for _, size in self.assignments)

    @property
    def up(self):
        return sum(self.outcomes)


@pytest.fixture
def finished(tiny_recipe, tmp_path):
    """A run with a client that is left out in each round, so that sampling shows."""
    return run(tiny_recipe({"federation.clients_per_round": 2, "evaluation.answers": 2}), tmp_path / "run")


def value_at(values, dotted):
    for key in dotted.split("."):
        values = values[key]
    return values


def contents(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_folder_holds_what_the_design_says_and_nothing_else(finished):
    assert contents(finished.folder) == {
        "recipe.yaml", "events.jsonl", "summary.json", "split.json", "answers.json", "report.html", ".lock",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md",
        *(f"checkpoints/round-000{r}/{name}" for r in (1, 2) for name in ("server.safetensors", "state.json")),
    }  # fmt: skip


def test_events_keep_to_their_schema_and_tell_the_whole_run(finished):
    lines = (finished.folder / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    for event in events:
        assert set(event) == {"event", "time", *SCHEMA[event["event"]]}
    assert [e["event"] for e in events] == [
        "run_started", "evaluation",
        *("round_started", "client_update", "client_update", "round_finished", "checkpoint", "evaluation") * 2,
        "run_finished",
    ]  # fmt: skip
    assert events == read_events(finished.folder / "events.jsonl")
    for started in (e for e in events if e["event"] == "round_started"):
        updates = [e["client"] for e in events if e["event"] == "client_update" and e["round"] == started["round"]]
        assert updates == started["clients"]


def test_the_summary_has_every_key_and_agrees_with_the_events(finished):
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary == finished.summary
    for key in SUMMARY_KEYS:
        value_at(summary, key)
    events = read_events(finished.folder / "events.jsonl")
    evaluations = [e for e in events if e["event"] == "evaluation"]
    assert (summary["loss"]["before"], summary["loss"]["after"]) == (evaluations[0]["loss"], evaluations[-1]["loss"])
    assert summary["loss"]["after"] < summary["loss"]["before"]
    assert (summary["clients"], summary["rounds"], summary["seed"]) == (3, 2, 42)
    updates = [e for e in events if e["event"] == "client_update"]
    assert summary["cost"]["train_tokens"] == sum(e["tokens"] for e in updates) > 0
    assert summary["cost"]["steps"] == sum(e["steps"] for e in updates) == 8
    worst = summary["loss"]["worst_client"]
    assert worst["after"] == max(c["loss"]["after"] for c in summary["per_client"].values())
    assert summary["data"]["examples"] == sum(summary["data"][k] for k in ("train", "validation", "test")) == 60


def test_the_pooled_loss_is_the_mean_over_all_test_tokens(finished):
    for event in read_events(finished.folder / "events.jsonl"):
        if event["event"] == "evaluation":
            sums = sum(c["loss"] * c["tokens"] for c in event["clients"].values())
            assert event["loss"] == pytest.approx(sums / sum(c["tokens"] for c in event["clients"].values()))


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("fedavg", {}),
        ("local", {}),
        ("local", {"evaluation.clients": 1, "federation.clients_per_round": 1, "federation.rounds": 1}),
        ("global", {}),
    ],
    ids=["fedavg", "local", "some are met first as they write their result", "global"],
)
def test_bytes_are_those_of_all_encoded_messages(tiny_recipe, tmp_path, monkeypatch, algorithm, more):
    counted = Counted(monkeypatch)
    result = run(tiny_recipe({"algorithm.name": algorithm, **more}), tmp_path / "run")
    cost = result.summary["cost"]
    assert (cost["upload_bytes"], cost["download_bytes"]) == (counted.up, counted.down)
    other = sum(size for kind, size in counted.assignments if kind != "train")  # and of the writing of personal results
    assert cost["evaluation_download_bytes"] == other
    assert cost["broadcast_bytes"] == sum(size for _, size in counted.first) > 0
    assert cost["evaluation_broadcast_bytes"] == sum(size for kind, size in counted.first if kind != "train")
    assert any(kind == "save" for kind, _ in counted.first) == bool(more)
    rounds = [e for e in read_events(result.folder / "events.jsonl") if e["event"] == "round_finished"]
    assert sum(e["download_bytes"] for e in rounds) == sum(s for kind, s in counted.assignments if kind == "train")
    adapter = result.summary["adapter"]["bytes"]
    trained = sum(1 for kind, _ in counted.assignments if kind == "train")
    moved = sum(e["upload_bytes"] for e in rounds)
    assert (moved > trained * adapter) if algorithm != "local" else (moved < trained * 2000)


def test_the_adapter_loads_with_peft_and_is_what_was_hashed(finished, tiny_model):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(base, finished.folder / "adapter")
    tensors = {n: p for n, p in model.named_parameters() if "lora" in n}
    assert any(bool(p.abs().sum() > 0) for n, p in tensors.items() if "lora_B" in n)
    saved = load_file(finished.folder / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, saved[name.replace(".default", "")])
    assert Adapter.of(saved).sha256() == finished.summary["adapter_sha256"]
    state = Checkpoints(finished.folder / "checkpoints").load(2)
    server = {n.removeprefix("shared/"): t for n, t in state.server.tensors.items()}
    assert Adapter.of(server).sha256() == finished.summary["adapter_sha256"]


def test_personal_results_are_saved_for_each_client(tiny_recipe, tmp_path, tiny_model):
    result = run(tiny_recipe({"algorithm.name": "local", "evaluation.answers": 2}), tmp_path / "run")
    assert not (result.folder / "adapter").exists()
    folders = sorted(p.name for p in (result.folder / "adapters").iterdir())
    assert folders == ["copy", "last", "upper"]
    saved = [load_file(result.folder / "adapters" / f / "adapter_model.safetensors") for f in folders]
    digests = {Adapter.of(tensors).sha256() for tensors in saved}
    assert len(digests) == 3
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), result.folder / "adapters" / "copy")
    assert sorted(p.name for p in (result.folder / "clients" / "copy").iterdir()) == [
        "round-0001.safetensors",
        "round-0002.safetensors",
    ]


def test_the_stored_recipe_runs_again_as_it_was(finished, tmp_path):
    stored = Recipe.load(finished.folder / "recipe.yaml")
    values = yaml.safe_load((finished.folder / "recipe.yaml").read_text())
    assert values["train"]["packing"] in {"on", "off"}  # what the probe chose
    assert values["data"]["template"] == "plain"
    assert values["runtime"]["threads"] == 1
    assert values["split"]["splitter"] == "meta"
    again = run(stored, tmp_path / "again")
    assert again.summary["adapter_sha256"] == finished.summary["adapter_sha256"]


def sampled(result):
    return [e["clients"] for e in read_events(result.folder / "events.jsonl") if e["event"] == "round_started"]


def test_a_fraction_samples_that_share_of_the_clients_and_the_seed_decides_which(
    tiny_recipe, tmp_path, tmp_path_factory
):
    data = tiny.write_rows(tmp_path_factory.mktemp("many") / "rows.jsonl", 120)
    wanted = {
        "data.path": str(data), "split.splitter": "uniform", "split.num_clients": 8, "federation.clients_per_round": 0.25,
        "federation.rounds": 6, "evaluation.every": 0, "train.steps": 1,
    }  # fmt: skip
    first = sampled(run(tiny_recipe(wanted), tmp_path / "a"))
    assert {len(clients) for clients in first} == {2}
    assert all(clients == sorted(clients) for clients in first)
    assert len({tuple(clients) for clients in first}) > 1
    assert sampled(run(tiny_recipe(wanted), tmp_path / "b")) == first
    assert sampled(run(tiny_recipe(wanted, seed=1), tmp_path / "c")) != first
    number = {**wanted, "federation.clients_per_round": 3}
    assert {len(clients) for clients in sampled(run(tiny_recipe(number), tmp_path / "d"))} == {3}


def test_local_clients_that_are_not_sampled_keep_what_they_had(tiny_recipe, tmp_path):
    recipe = tiny_recipe({"algorithm.name": "local", "federation.clients_per_round": 1, "federation.rounds": 3})
    result = run(recipe, tmp_path / "run")
    evaluations = [e for e in read_events(result.folder / "events.jsonl") if e["event"] == "evaluation"]
    for before, after, clients in zip(evaluations, evaluations[1:], sampled(result), strict=False):
        for client in before["clients"]:
            same = before["clients"][client]["loss"] == after["clients"][client]["loss"]
            assert same == (client not in clients)


def test_long_sequences_and_empty_answers_are_counted(tiny_recipe, tmp_path):
    rows = tiny.rows(40)
    rows[3]["output"] = ""
    rows[7]["output"] = "  "
    rows[11]["output"] = "long " * 40
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = run(tiny_recipe({"data.path": str(path)}), tmp_path / "run").summary["data"]
    assert data["dropped"] == {"empty_answer": 2}
    assert data["examples"] == 38
    assert data["truncated"] == 1
    assert data["truncated_tokens"] > 100
    report = (tmp_path / "run" / "report.html").read_text()
    assert "truncated" in report or "shortened" in report
