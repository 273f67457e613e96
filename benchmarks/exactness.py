"""How far each aggregation of LoRA is from Σ p_k ΔW_k, after three rounds of real training.

    python benchmarks/exactness.py                        a random model of two layers: seconds
    python benchmarks/exactness.py --model smollm2-135m   the built-in model on fed-skills: minutes

ΔW_k is all by which client k's weights differ from the base at the end of its last round, earlier rounds included. Lines
are `name=gap` with gap = ‖result − Σ p_k ΔW_k‖ / ‖Σ p_k ΔW_k‖ over all weights:

    NAME.float64   the rule itself, on the factors that clients sent, in float64
    NAME.float32   what the server deploys (fp32), measured from its factors
    NAME.merged    the largest difference of a merged weight from W + Σ p_k ΔW_k, absolute

The controls: `fedit`, and `flora` without α/r. The exit code is 1 where an exact rule is not, or a control is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedloom.recipe.recipe import Recipe

import torch  # isort: skip

from fedloom.algorithms.lora.fed_sb import middle
from fedloom.algorithms.lora.fedex_lora import averaged
from fedloom.experiment.assemble import assemble
from fedloom.experiment.prepare import prepare
from fedloom.federation.record.run_folder import opened
from fedloom.federation.watch import Watch
from fedloom.messages.types import Update
from fedloom.models.loading import quiet_transformers
from fedloom.models.lowrank import LowRank, relative_gap

EXACT = ("flora", "fedex_lora", "ffa_lora", "fed_sb")
Sums = dict[str, LowRank]


def factors(algorithm: Any, tensors: Mapping[str, torch.Tensor]) -> Sums:
    """Base weight → s·B·A in float64; what did not travel is what both sides hold."""
    sums = {}
    for p in algorithm.pairs:
        scale = algorithm.scales[p.weight]
        if middle(p.a) in tensors:
            b, a = algorithm.left[p.b].double(), tensors[middle(p.a)].double() @ algorithm.right[p.a].double()
        else:
            own = {p.a: algorithm.shared.views[p.a], p.b: algorithm.shared.views[p.b], **tensors}
            b, a = own[p.b].double(), own[p.a].double()
        sums[p.weight] = LowRank(scale * b, a)
    return sums


def delta_of(algorithm: Any) -> Sums:
    """The base delta so far, in float64."""
    tensors = algorithm.deployed().base_delta or {}
    low = {w: w + ".B" in tensors for w in (p.weight for p in algorithm.pairs)}
    found = {w: LowRank(tensors[w + ".B"].double(), tensors[w + ".A"].double()) for w, is_low in low.items() if is_low}
    for w in low:
        if w in tensors:
            found[w] = LowRank(tensors[w].double(), torch.eye(tensors[w].shape[1], dtype=torch.float64))
    return found


def plus(first: Sums, second: Sums) -> Sums:
    return {w: second[w].plus(first[w]) if w in first else second[w] for w in second}


def mean(algorithm: Any, updates: list[Update], shares: list[float]) -> Sums:
    """The plain mean of what was sent, in float64, as factors."""
    names = updates[0].payload.tensors
    return factors(
        algorithm,
        {n: sum(p * u.payload.tensors[n].double() for p, u in zip(shares, updates, strict=True)) for n in names},
    )


def rule(name: str, algorithm: Any, updates: list[Update], shares: list[float]) -> Sums:
    """One round of an algorithm's own arithmetic in float64."""
    each = [factors(algorithm, u.payload.tensors) for u in updates]
    weights = [p.weight for p in algorithm.pairs]
    if name == "flora":
        held = algorithm.held(updates)
        return {p.weight: algorithm.total(held, p) for p in algorithm.pairs}
    if name == "fedex_lora":
        both = {w: averaged(shares, [e[w].b for e in each], [e[w].a for e in each]) for w in weights}
        return {w: result.plus(residual) for w, (result, residual) in both.items()}
    return mean(algorithm, updates, shares)


def merged_difference(algorithm: Any, exact: Sums) -> float:
    """The largest |merged − (W + Σ p_k ΔW_k)|, merged by peft as an export is."""
    model = algorithm.model
    model.set_base_delta(None)
    weights = model.base_weights()
    loaded = {w: weights[w].detach().clone() for w in exact}
    deployed = algorithm.deployed()
    model.set_base_delta(deployed.base_delta)
    model.adapter.copy_(deployed.adapter.flat)
    model.module.merge_adapter()
    differences = (weights[w].detach().double() - loaded[w] - low.dense() for w, low in exact.items())
    return max(float(difference.abs().max()) for difference in differences)


def measure(name: str, recipe: Recipe, rounds: int) -> dict[str, float]:
    """Run `recipe` and compare its last round's aggregation with what the clients learned."""
    setting = prepare(recipe, Watch())
    algorithm: Any = setting.algorithm
    aggregate: Callable[[Iterator[Update]], Mapping[str, float]] = algorithm.aggregate
    found: dict[str, float] = {}
    seen = 0

    def watched(updates: Iterable[Update]) -> Mapping[str, float]:
        nonlocal seen
        listed = sorted(updates, key=lambda u: u.client)
        seen += 1
        if seen < rounds:
            return aggregate(iter(listed))
        shares = [u.num_examples / sum(v.num_examples for v in listed) for u in listed]
        earlier = delta_of(algorithm)
        each = [factors(algorithm, u.payload.tensors) for u in listed]
        learned = {
            w: LowRank.stack((p, e[w].b, e[w].a) for p, e in zip(shares, each, strict=True)) for w in each[0]
        }  # the definition
        exact = plus(earlier, learned)
        found[f"{name}.float64"] = relative_gap(plus(earlier, rule(name, algorithm, listed, shares)), exact)
        if name == "flora":
            unscaled = {w: LowRank(low.b / algorithm.scales[w], low.a) for w, low in learned.items()}
            found["flora_without_alpha_over_r.float64"] = relative_gap(plus(earlier, unscaled), exact)
        metrics = aggregate(iter(listed))
        result = plus(delta_of(algorithm), factors(algorithm, algorithm.shared.tensors()))
        found[f"{name}.float32"] = relative_gap(result, exact)
        found[f"{name}.merged"] = merged_difference(algorithm, exact)
        return metrics

    algorithm.aggregate = watched
    with (
        tempfile.TemporaryDirectory() as scratch,
        opened(Path(scratch) / "run", resume=False, overwrite=False) as folder,
    ):
        coordinator = assemble(setting, folder, False, Watch())
        coordinator.run()
        coordinator.events.close()
        coordinator.close()
    return found


def recipe_for(model: str, name: str, rounds: int, scratch: Path) -> Recipe:
    values: dict[str, Any] = {
        "name": "exactness",
        "algorithm": {"name": name},
        "federation": {"rounds": rounds},
        "evaluation": {"suite": None, "answers": 0, "every": 0},
    }
    if model == "tiny":
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from tests.helpers import tiny

        with quiet_transformers():
            folder = tiny.save_model(scratch / "model")
        values |= {
            "model": str(folder),
            "data": {"path": str(tiny.write_rows(scratch / "rows.jsonl")), "max_length": 96, "template": "plain"},
            "split": {"splitter": "meta", "test": 0.0, "validation": 0.0},
            "adapter": {"rank": 4, "alpha": 8},
            "train": {"steps": 6, "batch_size": 2, "lr": 1e-2},
        }
    else:
        values |= {
            "model": model,
            "data": {"corpus": "fed-skills", "limit": 96},
            "split": {"splitter": "meta", "test": 0.0, "validation": 0.0, "num_clients": 3},
            "train": {"steps": 4, "batch_size": 2, "lr": 1e-3},
        }
    return Recipe.parse(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a model as in a recipe (smollm2-135m)")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, float] = {}
    for name in (*EXACT, "fedit"):
        with tempfile.TemporaryDirectory() as scratch:
            measured = measure(
                name, recipe_for(arguments.model, name, arguments.rounds, Path(scratch)), arguments.rounds
            )
        for line, gap in measured.items():
            print(f"{line}={gap:.3g}", flush=True)
        found |= measured
    limits = {"float64": 1e-12, "float32": 1e-6, "merged": 1e-4}
    wrong = [f"{n}.{kind}" for n in EXACT for kind, limit in limits.items() if not found[f"{n}.{kind}"] <= limit]
    controls = ("fedit.float64", "fedit.float32", "flora_without_alpha_over_r.float64")
    wrong += [n for n in controls if not found[n] >= 1e-3]
    if wrong:
        print(f"not as it should be: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
