"""What each operator chain costs and saves: bytes of whole messages, milliseconds each way, error, as `name=value` lines.

    python benchmarks/messages.py                  random numbers in the names and shapes of SmolLM2-135M's adapter
                                                   (LoRA, rank 8, all linears), an update a tenth of its size away
    python benchmarks/messages.py --run runs/mine  a trained adapter: a run's last two checkpoints (of an algorithm that
                                                   keeps one, such as fedavg) are the broadcast and the update

    adapter=        random or trained, and its bytes in fp32
    NAME_ratio=     bytes of the fp32 message over bytes of this one, names and header included, one in each direction
    NAME_error=     ‖decoded − sent‖ / ‖sent‖; after `delta` of the difference from the broadcast
    NAME_encode_ms= operators and wire, sender's side; NAME_decode_ms= receiver's side; medians of five

The exit code is 1 where int8_ratio < 3.9, int4_ratio < 7.5, the error of int8 is over 1 % or that of int4 over 15 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from fedloom.checkpoint import Checkpoints  # first: it sets what torch reads when it is imported

import torch  # isort: skip

from fedloom.operators.chain import Chain
from fedloom.runtimes import wire
from fedloom.types import Payload, Update

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run's folder")
    arguments = parser.parse_args()
    before, after = trained_pair(arguments.run) if arguments.run else random_pair()
    print(f"adapter={'trained' if arguments.run else 'random'}, {sum(t.nbytes for t in after.values())} bytes")
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
    good = found["int8"]["ratio"] >= 3.9 and found["int4"]["ratio"] >= 7.5
    good = good and found["int8"]["error"] <= 0.01 and found["int4"]["error"] <= 0.15
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
