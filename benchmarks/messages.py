"""What each operator chain costs and saves: bytes, milliseconds, error, and how much of what is learned it keeps.

    python benchmarks/messages.py                      random numbers in the names and shapes of SmolLM2-135M's adapter
                                                       (LoRA, rank 8, all linears), an update a tenth of its size away;
                                                       learning with a random model of two layers: a minute
    python benchmarks/messages.py --model smollm2-135m the built-in model on fed-skills, and the adapter that it learned
                                                       there: half an hour
    python benchmarks/messages.py --run runs/mine      another trained adapter: a run's last two checkpoints (of an
                                                       algorithm that keeps one, such as fedavg) are the broadcast and
                                                       the update; nothing is learned
    python benchmarks/messages.py --only int8 zeroed   of the runs that learn, these and fp32's

Of one message, as `name=value` lines:

    adapter=            random or trained, and its bytes in fp32
    NAME_ratio=         bytes of the fp32 message over bytes of this one, names and header included, one in each direction
    NAME_error=         ‖decoded − sent‖ / ‖sent‖; after `delta` of the difference from the broadcast
    NAME_encode_ms=     operators and wire, sender's side; NAME_decode_ms= receiver's side; medians of five
    NAME_identity=      of error feedback, over six messages: ‖Σ decoded + residual − Σ sent‖ / ‖Σ sent‖

Of a run (FedAvg, two clients, the same recipe but for `operators`; the loss is that of the clients' test data):

    CHAIN.ratio=        uploaded bytes of fp32's run over this run's
    CHAIN.kept=         percent of fp32's fall of the loss
    best_chain=         of the chains with at least 99 % of it the one that uploads least

Two runs are controls, which a test that can tell anything from anything has to fail: `zeroed`, whose uplink brings nothing,
and `bits2`, weights in 2 bits without delta and error feedback. The exit code is 1 where int8_ratio < 3.9, int4_ratio < 7.5,
the error of int8 is over 1 % or that of int4 over 15 %, an identity is over 1e-6, a recommended chain keeps less than 99 %
or a control more than 90 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

from fedloom.recipe.recipe import Recipe

import torch  # isort: skip

from fedloom.common import registry
from fedloom.experiment.assemble import assemble
from fedloom.experiment.prepare import prepare
from fedloom.federation.record.checkpoints import Checkpoints
from fedloom.federation.record.run_folder import opened
from fedloom.federation.watch import Watch
from fedloom.messages import wire
from fedloom.messages.operators.base import Around, Notes, Operator, is_float
from fedloom.messages.operators.chain import Chain
from fedloom.messages.operators.flat import Part, Parts, Spec
from fedloom.messages.types import Payload, Update
from fedloom.models.attach import Models
from fedloom.models.loading import quiet_transformers

INT4: dict[str, Any] = {"name": "quantize", "bits": 4}
TOP: dict[str, Any] = {"name": "sparsify", "fraction": 0.1}
CHAINS: dict[str, list[Any]] = {
    "fp32": [],
    "deflate": ["deflate"], "gzip": ["gzip"], "zstd": ["zstd"], "lz4": ["lz4"], "delta_zstd": ["delta", "zstd"],
    "bf16": ["bf16"], "fp16": ["fp16"], "fp16_zstd": ["fp16", "zstd"],
    "int8": [{"name": "quantize", "bits": 8}],
    "int8_stochastic": [{"name": "quantize", "bits": 8, "rounding": "stochastic"}],
    "int8_zstd": [{"name": "quantize", "bits": 8}, "zstd"],
    "int4": [INT4], "int4_stochastic": [{**INT4, "rounding": "stochastic"}], "int4_deflate": [INT4, "deflate"],
    "bits2": [{"name": "quantize", "bits": 2}], "ternary": [{"name": "quantize", "bits": "ternary"}],
    "delta_int4": ["delta", INT4], "delta_top10": ["delta", TOP], "delta_top10_int8": ["delta", TOP, "quantize"],
    "delta_top1_int8": ["delta", {**TOP, "fraction": 0.01}, "quantize"],
    "delta_random10": ["delta", {**TOP, "method": "random_k"}],
}  # fmt: skip

#: Linear layers of SmolLM2-135M: name → (inputs, outputs); 30 blocks of them.
LINEARS = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (576, 192), "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536), "mlp.up_proj": (576, 1536), "mlp.down_proj": (1536, 576),
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def random_pair() -> tuple[Tensors, Tensors]:
    """(broadcast, update): A uniform as it is initialised, B normal, the difference normal."""
    draw = torch.Generator().manual_seed(0)
    before, after = {}, {}
    for layer in range(30):
        for name, (wide, out) in LINEARS.items():
            where = f"model.layers.{layer}.{name}"
            before[f"{where}.lora_A.weight"] = (torch.rand(8, wide, generator=draw) * 2 - 1) / wide**0.5
            before[f"{where}.lora_B.weight"] = torch.randn(out, 8, generator=draw) * 0.01
    for name, t in before.items():
        after[name] = t + 0.1 * t.std() * torch.randn(t.shape, generator=draw)
    return before, after


def trained_pair(run: Path) -> tuple[Tensors, Tensors]:
    """The shared adapter of a run's last two checkpoints."""
    checkpoints = Checkpoints(run / "checkpoints")
    newest, before = (checkpoints.load(r).server.tensors for r in checkpoints.rounds()[:2])
    return tuple({n: t for n, t in s.items() if n.startswith("shared/")} for s in (before, newest))  # type: ignore[return-value]


def norm(tensors: Tensors) -> float:
    return float(sum(float(t.double().square().sum()) for t in tensors.values())) ** 0.5


def measure(described: list[Any], before: Tensors, after: Tensors) -> dict[str, float]:
    chain = Chain.parse(described)
    encode, decode = [], []
    for _ in range(5):
        start = time.perf_counter()
        message = wire.encode_outcome(
            Update("a", 1, chain.encode(Payload(after), torch.Generator().manual_seed(0), before))
        )
        middle = time.perf_counter()
        outcome = wire.decode_outcome(message)
        assert isinstance(outcome, Update)
        got = chain.decode(outcome.payload, before).tensors
        encode.append(middle - start)
        decode.append(time.perf_counter() - middle)
    sent = {n: after[n] - before[n] for n in after} if chain.needs_reference else after
    return {
        "bytes": len(message),
        "error": norm({n: got[n] - after[n] for n in after}) / norm(sent),
        "encode_ms": 1e3 * statistics.median(encode),
        "decode_ms": 1e3 * statistics.median(decode),
    }


def identity(described: list[Any], before: Tensors, after: Tensors) -> float:
    """Six messages on the way from `before` to `after`, the residual handed on: what of their sum is lost."""
    chain, residual = Chain.parse(described), {}
    sent = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in after.items()}
    got = {n: t.clone() for n, t in sent.items()}
    for i in range(1, 7):
        raw = {n: (after[n] - before[n]) * (i / 6) for n in after}
        decoded = chain.decode(chain.encode(Payload(raw), torch.Generator().manual_seed(i), residual=residual))
        for n, t in raw.items():
            sent[n] += t
            got[n] += decoded.tensors[n]
    return norm({n: got[n] + residual[n] - sent[n] for n in sent}) / norm(sent)


# ------------------------------------------------------------------ learning


class Zeroed(Operator):
    """A control: after `delta` nothing of an update arrives."""

    lossless: ClassVar[bool] = False

    def layout(self, spec: Spec, exact: bool = False) -> Spec:
        return dict(spec)

    def encode(self, parts: Parts, around: Around) -> tuple[Parts, Notes]:
        return {n: torch.zeros_like(t) if is_float(Part(t.dtype, 0)) else t for n, t in parts.items()}, {}

    def decode(self, parts: Parts, spec: Spec, notes: Notes, around: Around) -> Parts:
        return dict(parts)


def feedback(operator: dict[str, Any]) -> dict[str, Any]:
    return {**operator, "error_feedback": True}


INT8: dict[str, Any] = {"name": "quantize", "bits": 8}
BITS2: dict[str, Any] = {"name": "quantize", "bits": 2}
TERNARY: dict[str, Any] = {"name": "quantize", "bits": "ternary"}

#: What docs/operators.md recommends: name → (up, down).
RECOMMENDED: dict[str, tuple[list[Any], list[Any]]] = {
    "bf16": (["bf16"], ["bf16"]), "fp16": (["fp16"], ["fp16"]),
    "int8": ([INT8], [INT8]), "int8_zstd": ([INT8, "zstd"], [INT8, "zstd"]),
    "delta_int4_ef": (["delta", feedback(INT4)], []),
    "quantised": (["delta", feedback(INT4), "deflate"], [INT8]),  # the recipe of this name
}  # fmt: skip
#: What it says the truth about.
OTHERS: dict[str, tuple[list[Any], list[Any]]] = {
    "delta_int4": (["delta", INT4], []),
    "delta_bits2_ef": (["delta", feedback(BITS2)], []), "delta_ternary_ef": (["delta", feedback(TERNARY)], []),
    "delta_ternary": (["delta", TERNARY], []),
    "delta_top10_ef": (["delta", feedback(TOP)], []), "delta_top10_int8_ef": (["delta", feedback(TOP), INT8], []),
    "delta_top1_int8_ef": (["delta", feedback({**TOP, "fraction": 0.01}), INT8], []),
    "delta_random10_ef": (["delta", feedback({**TOP, "method": "random_k"})], []),
}  # fmt: skip
CONTROLS: dict[str, tuple[list[Any], list[Any]]] = {"zeroed": (["delta", "zeroed"], []), "bits2": ([BITS2], [])}
KEEPS, FAILS = 99.0, 90.0


def recipe_for(model: str, scratch: Path) -> dict[str, Any]:
    """Short rounds, so that each moves the adapter by little, and enough of them."""
    values: dict[str, Any] = {
        "name": "messages",
        "split": {"splitter": "uniform", "num_clients": 2, "test": 0.1},
        "adapter": {"rank": 8, "alpha": 16, "target_modules": "all-linear"},
        "evaluation": {"suite": None, "answers": 0, "every": 0},
    }
    if model != "tiny":
        data = {"corpus": "fed-skills", "max_length": 128, "limit": 400, "template": "plain"}
        train = {"steps": 1, "batch_size": 4, "lr": 1e-3, "schedule": "constant"}
        return values | {"model": model, "data": data, "train": train, "federation": {"rounds": 16}}
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.helpers import tiny

    with quiet_transformers():
        folder = tiny.save_model(scratch / "model")
    data = {"path": str(tiny.write_rows(scratch / "rows.jsonl")), "max_length": 96, "template": "plain"}
    train = {"steps": 3, "batch_size": 4, "lr": 5e-3, "schedule": "linear"}
    return values | {"model": str(folder), "data": data, "train": train, "federation": {"rounds": 12}}


class Learning:
    """Runs of one recipe that differ in their chains; the base model is loaded once."""

    def __init__(self, model: str, scratch: Path) -> None:
        self._values = recipe_for(model, scratch)
        self._scratch = scratch
        self._models: Models | None = None

    def run(self, name: str, up: list[Any], down: list[Any]) -> dict[str, float]:
        """Loss before and after, and bytes of all updates. The run's folder is `name` in the scratch folder."""
        chains = {"initial": down, "up": up, "down": down}
        listed = {k: [{"name": o} if isinstance(o, str) else o for o in chain] for k, chain in chains.items()}
        setting = prepare(Recipe.parse({**self._values, "operators": listed}), Watch(), models=self._models)
        self._models = setting.models
        with opened(self._scratch / name, resume=False, overwrite=False) as folder:
            coordinator = assemble(setting, folder, False, Watch())
            progress = coordinator.run()
            coordinator.events.close()
            coordinator.close()
        first, last = progress.evaluations[0], progress.evaluations[progress.finished]
        return {"before": first.loss, "after": last.loss, "upload": progress.cost.upload_bytes}


def learned(learning: Learning, fp32: dict[str, float], names: list[str]) -> list[str]:
    """Prints what each chain keeps; what is not as it should be."""
    wrong, best = [], ("fp32", 1.0)
    print(f"loss_before={fp32['before']:.4f}\nloss_after={fp32['after']:.4f}")
    for name, (up, down) in {**CONTROLS, **RECOMMENDED, **OTHERS}.items():
        if name not in names:
            continue
        found = learning.run(name, up, down)
        kept = 100 * (found["before"] - found["after"]) / (fp32["before"] - fp32["after"])
        ratio = fp32["upload"] / found["upload"]
        print(f"{name}.ratio={ratio:.2f}\n{name}.kept={kept:.2f}", flush=True)
        if name in CONTROLS:
            wrong += [f"{name}.kept={kept:.2f}"] if kept > FAILS else []
            continue
        if kept >= KEEPS and ratio > best[1]:
            best = name, ratio
        wrong += [f"{name}.kept={kept:.2f}"] if kept < KEEPS and name in RECOMMENDED else []
    print(f"best_chain={best[0]}")
    return wrong


# ------------------------------------------------------------------ all of it


def messages(before: Tensors, after: Tensors) -> list[str]:
    """Prints what one message costs; what is not as it should be."""
    found: dict[str, dict[str, float]] = {}
    for name, described in CHAINS.items():
        found[name] = measure(described, before, after)
        ratio = found["fp32"]["bytes"] / found[name]["bytes"]
        found[name]["ratio"] = ratio
        print(f"{name}_ratio={ratio:.2f}\n{name}_error={found[name]['error']:.2g}")
        print(
            f"{name}_encode_ms={found[name]['encode_ms']:.0f}\n{name}_decode_ms={found[name]['decode_ms']:.0f}",
            flush=True,
        )
    limits = {"int8": (3.9, 0.01), "int4": (7.5, 0.15)}
    wrong = [f"{n}_ratio" for n, (least, _) in limits.items() if found[n]["ratio"] < least]
    wrong += [f"{n}_error" for n, (_, most) in limits.items() if found[n]["error"] > most]
    for name, (up, _) in {**RECOMMENDED, **OTHERS}.items():
        if not Chain.parse(up).error_feedback:
            continue
        left = identity(up[1:], before, after)
        print(f"{name}_identity={left:.2g}")
        wrong += [f"{name}_identity"] if left > 1e-6 else []
    return wrong


def main() -> int:
    every = [*RECOMMENDED, *OTHERS, *CONTROLS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, or a model as in a recipe (smollm2-135m)")
    parser.add_argument("--run", type=Path, help="a run's folder, whose adapter is sent; nothing is learned then")
    parser.add_argument("--only", nargs="+", default=every, choices=every)
    arguments = parser.parse_args()
    registry.operators.register("zeroed", Zeroed)
    with tempfile.TemporaryDirectory() as scratch:
        learning = None if arguments.run else Learning(arguments.model, Path(scratch))
        fp32 = learning.run("fp32", [], []) if learning else {}
        trained = arguments.run or (None if arguments.model == "tiny" else Path(scratch) / "fp32")
        before, after = trained_pair(trained) if trained else random_pair()
        print(f"adapter={'trained' if trained else 'random'}, {sum(t.nbytes for t in after.values())} bytes")
        wrong = messages(before, after)
        if learning:
            wrong += learned(learning, fp32, arguments.only)
    if wrong:
        print(f"not as it should be: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
