"""A run folder as fedloom writes one, with made-up numbers: the report's tests need no model."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.federation.record.client_table import MANY, ClientTable
from fedloom.federation.record.events import Events
from fedloom.recipe.recipe import Recipe

SKILLS = [
    "basic_arithmetic", "chain_sum", "letter_counting", "number_sorting", "spell_backward", "caesar_cipher", "gcd",
    "leg_counting",
]  # fmt: skip
SCRIPT = "<script>alert('boo')</script> & \"quoted\" {{ 7 * 7 }}"

FIVE = ("full_zero_shot", "emulator_zero_shot", "emulator_tuned", "plug_in", "full_tuned")
OFFSITE: dict[str, Any] = {
    **{name: {"loss": 1.25 + i / 8, "score": 0.125 * i} for i, name in enumerate(FIVE)},
    "note": "",
    "left_server": {
        "parameters": 116_000_001, "parameters_of_model": 134_515_008, "bytes": 464_000_007, "bytes_of_model": 538_060_032,
        "share_of_parameters": 0.8625, "share_of_bytes": 0.8635,
    },
}  # fmt: skip


def write_run(
    path: Path,
    num_clients: int = 8,
    rounds: int = 5,
    score: bool = True,
    finished: bool = True,
    seed: int = 7,
    overrides: dict[str, Any] | None = None,
    offsite: bool = False,
) -> Path:
    """Write a run folder. `score` false is a corpus that cannot be scored; `finished` false stops early.

    `offsite`: the clients held an emulator.
    """
    path.mkdir(parents=True)
    draw = random.Random(seed)
    named = num_clients <= len(SKILLS)
    clients = SKILLS[:num_clients] if named else [f"client-{i:03d}" for i in range(num_clients)]
    values = {"name": path.name, "description": "Eight skills, one a client.", "federation.rounds": rounds}
    recipe = Recipe.parse({}, {**values, **(overrides or {})})
    (path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    split = _split(clients, named, draw)
    (path / "split.json").write_text(json.dumps(split), encoding="utf-8")
    _write_events(path, recipe, split, score, finished, draw)
    answers = _answers(clients, score)
    if finished:
        summary = {**_summary(path, recipe, split, score), "offsite": OFFSITE if offsite else None}
        (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    else:
        answers["answers"] = [{**a, "after": None, "right_after": None} for a in answers["answers"]]
    (path / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
    return path


def _split(clients: list[str], named: bool, draw: random.Random) -> dict[str, Any]:
    rows = []
    for i, client in enumerate(clients):
        if named:
            counts = {client: 150 + 40 * i}
        else:
            weights = [draw.gammavariate(0.3, 1.0) for _ in SKILLS]
            size = draw.randint(20, 160)
            counts = {s: round(size * w / sum(weights)) for s, w in zip(SKILLS, weights, strict=True)}
        total = sum(counts.values())
        test, validation = total // 10, total // 20
        sizes = {"train": total - test - validation, "validation": validation, "test": test}
        rows.append({"client": client, **sizes, "categories": counts})
    return {"splitter": "meta" if named else "dirichlet", "seed": 42, "categories": SKILLS, "clients": rows}


def _write_events(
    path: Path, recipe: Recipe, split: dict[str, Any], score: bool, finished: bool, draw: random.Random
) -> None:
    events = Events(path / "events.jsonl")
    names = [row["client"] for row in split["clients"]]
    rounds, start = recipe.federation.rounds, {name: 1.7 + 0.9 * draw.random() for name in names}
    pace = {name: 0.25 + 0.5 * draw.random() for name in names}

    def evaluate(done: int) -> None:
        clients = {}
        for row in split["clients"]:
            name = row["client"]
            loss = start[name] * (0.35 + 0.65 * math.exp(-pace[name] * done)) + 0.03 * draw.random()
            right = round(20 * min(1.0, 0.08 + 0.75 * (1 - math.exp(-pace[name] * done)))) / 20
            measured = {"loss": loss, "tokens": 40 * row["test"], "score": right if score else None}
            clients[name] = {**measured, "questions": 20 if score else 0}
        tokens = sum(c["tokens"] for c in clients.values())
        loss = sum(c["loss"] * c["tokens"] for c in clients.values()) / tokens
        mean = sum(c["score"] for c in clients.values()) / len(clients) if score else None
        counted = {"questions": 20 * len(names) if score else 0, "tokens": tokens}
        counted |= ClientTable(path / "evaluations").told(done, clients)
        events.write(
            "evaluation",
            round=done,
            loss=loss,
            score=mean,
            seconds=9.5,
            virtual_seconds=None,
            pooled=False,
            emulator=None,
            preference=None,
            **counted,
        )

    about = {"algorithm": recipe.algorithm.name, "model": recipe.model.name, "corpus": recipe.data.corpus}
    events.write("run_started", name=recipe.name, clients=len(names), rounds=rounds, parameters=1_216_512, **about)
    evaluate(0)
    for r in range(1, rounds + 1 if finished else rounds - 1):
        events.write("round_started", round=r, clients=names)
        losses = []
        for name in names:
            if r == 2 and name == names[2]:
                detail = "loss nan at step 3 of 8: lower train.lr, or set train.nonfinite=skip"
                events.write("client_failed", round=r, client=name, kind="train", reason="non_finite", detail=detail)
                continue
            losses.append(start[name] * (0.3 + 0.6 * math.exp(-pace[name] * r)))
            work = {"examples": 200, "tokens": 8123, "steps": 8, "skipped_steps": 0, "loss": losses[-1]}
            sent = {
                "upload_bytes": 2_441_100 + r,
                "download_bytes": 2_441_096,
                "broadcast_bytes": 0,
                "seconds": 4.2,
                "staleness": 0,
                "arrived": None,
                "metrics": {},
            }
            events.write("client_update", round=r, client=name, **work, **sent)
        moved = {"upload_bytes": 2_441_100 * len(losses), "download_bytes": 2_441_096 * len(names)}
        done = {"updates": len(losses), "failures": len(names) - len(losses), "loss": sum(losses) / len(losses)}
        events.write("round_finished", round=r, seconds=35 + 3.1 * draw.random(), metrics={}, **done, **moved)
        evaluate(r)
        events.write("checkpoint", round=r, path=f"round-{r}")
    if finished:
        events.write("run_finished", rounds=rounds, adapter_sha256="ab" * 32, seconds=252.3)


def _summary(path: Path, recipe: Recipe, split: dict[str, Any], score: bool) -> dict[str, Any]:
    lines = (path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = [e for e in map(json.loads, lines) if e["event"] == "evaluation"]
    first, last = (
        {**e, "clients": ClientTable(path / "evaluations").clients(e["round"], e)}
        for e in evaluations[:: len(evaluations) - 1]
    )

    def pair(key: str, client: str) -> dict[str, Any]:
        return {"before": first["clients"][client][key], "after": last["clients"][client][key]}

    rows = split["clients"]
    worst = max(last["clients"], key=lambda c: last["clients"][c]["loss"])
    poorest = min(last["clients"], key=lambda c: last["clients"][c]["score"] or 0.0)
    sizes = {key: sum(row[key] for row in rows) for key in ("train", "validation", "test")}
    note = None if score else "no suite of this corpus runs here; set evaluation.suite to score it"
    return {
        "name": recipe.name, "description": recipe.description, "algorithm": recipe.algorithm.name,
        "corpus": recipe.data.corpus, "corpus_license": "CC BY-SA 3.0", "corpus_source": "generated, seed 42",
        "model": recipe.model.name, "base": {"dtype": "float32", "quantization": None},
        "adapter": {"method": "lora", "parameters": 1_216_512, "bytes": 4_866_048},
        "score": {
            "before": first["score"], "after": last["score"], "suite": "skills" if score else None,
            "worst_client": {"client": poorest, **pair("score", poorest)} if score else None,
            "questions": last["questions"], "note": note or "",
        },
        "loss": {
            "before": first["loss"], "after": last["loss"], "worst_client": {"client": worst, **pair("loss", worst)},
        },
        "cost": {
            "upload_bytes": 95_202_900, "download_bytes": 97_643_840, "train_tokens": 316_797,
            "train_flops": 2.59e14, "steps": 312, "wall_seconds": 252.3, "cpu_seconds": 498.1, "client_cpu_seconds": 470.2, "gpu_seconds": 180.5,
            "evaluation_upload_bytes": 14_200, "evaluation_download_bytes": 48_820_100,
            "broadcast_bytes": 19_530_000, "evaluation_broadcast_bytes": 4_882_000, "evaluation_seconds": 57.25,
            "peak_memory_bytes": 1_734_000_000, "gpu_utilisation": None,
        },
        "virtual": recipe.devices and {"seconds": 93.5, "loss": [[0.0, first["loss"]], [93.5, last["loss"]]]},
        "preference": (recipe.train.objective == "dpo" and {
            "accuracy": {"before": 0.0, "after": 0.8125}, "loss": {"before": 0.6931, "after": 0.4321},
            "margin": {"before": 0.0, "after": 1.234}, "pairs": 48,
        }) or None,
        "privacy": recipe.privacy and {
            "epsilon": 6.57, "delta": 1e-5, "epsilon_models": None, "where": "server", "noise": 1.0, "clip": 0.5,
            "adaptive": False, "population": len(rows), "expected_clients": len(rows), "sampling_rate": 1.0,
            "releases": 2, "seeded": False,
        },
        "clients": len(rows), "rounds": recipe.federation.rounds, "stopped": None, "seed": 42, "failures": 1, "skipped_steps": 0,
        "data": {
            "examples": sum(sizes.values()), **sizes, "dropped": {"empty_answer": 3}, "truncated": 11,
            "truncated_tokens": 1904, "max_length": 512,
        },
        "per_client": {
            row["client"]: {
                "train": row["train"], "test": row["test"],
                "loss": pair("loss", row["client"]), "score": pair("score", row["client"]),
            }
            for row in sorted(rows, key=lambda row: -last["clients"][row["client"]]["loss"])[:MANY]
        },
        "adapter_sha256": "ab" * 32, "versions": {"torch": "2.13.0", "transformers": "5.1.0", "peft": "0.19.0"},
        "environment": {"python": "3.11.7", "system": "Linux", "cpu_cores": 2, "threads": 2, "device": "cpu"},
        "git": "7f8c750", "finished": "2030-01-02T03:04:05+00:00",
    }  # fmt: skip


def _answers(clients: list[str], score: bool) -> dict[str, Any]:
    asked = [
        ("How many legs are there in total if there are 3 sheep and 4 hens?", "20", "There are 7 legs.", "20"),
        ("Spell this word backward (example: sun -> nus): loom", "mool", "loom", "mool"),
        (f"What is printed by this line?\n{SCRIPT}", SCRIPT, SCRIPT, f"It prints {SCRIPT}"),
        ("Find the greatest common divisor of 84 and 36. Answer with the number alone.", "12", "4", "6"),
        (
            "Sort ascending: 9, 4, 17, 3",
            "['3', '4', '9', '17']",
            "The numbers sorted are 3, 9, 4, 17. " * 6,
            "['3', '4']",
        ),
    ]
    rows = []
    for i, (prompt, expected, before, after) in enumerate(asked):
        said = {"prompt": prompt, "expected": expected, "before": before, "after": after}
        marks = {"right_before": False if score else None, "right_after": after == expected if score else None}
        client = clients[i % len(clients)]
        rows.append({"client": client, "category": SKILLS[i], **said, **marks})
    return {"suite": "skills" if score else None, "answers": rows}


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """Call with a name and the options of `write_run`: writes a run folder and returns its path."""
    return lambda name, **options: write_run(tmp_path / name, **options)
