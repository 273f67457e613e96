"""What each operator of the trainer costs and saves, side by side in one run, as `name=value` lines.

    python benchmarks/operators.py              a Llama of 8 layers and 9M weights, vocabulary 16,384, LoRA r=8, packed
    python benchmarks/operators.py --model M    a model's folder or name, such as smollm2-135m
    python benchmarks/operators.py --only NAME  one case: checkpointing, loss_chunk, both, bf16, fp16, prefix, quantised,
                                                offload, attention, compile
    python benchmarks/operators.py --whole      with compile: the whole model compiled as well, minutes

For each of checkpointing, loss_chunk and both, on a GPU also bf16 and fp16, against plain training of the same batches:

    NAME_time_ratio=      CPU seconds of its forward and backward over plain's, medians of interleaved pairs
    NAME_kept_ratio=      bytes that its forward leaves for backward (weights not counted), over plain's
    NAME_loss_difference= |its loss − plain's|
    NAME_gradient_error=  ‖its gradient − plain's‖ / ‖plain's‖

Adapters on the last quarter of the layers, the frozen ones below them computed anew or kept (train.cache_prefix):

    upper_layers_time_ratio= seconds of a pass with adapters on the last layers over one with adapters on all
    prefix_speedup=       seconds of a pass that computes the frozen layers over one that reads what they gave
    prefix_loss_difference=, prefix_gradient_error=   between those two

The base in 8 or 4 bits (model.quantization), on a CPU:

    KIND_memory_ratio=    bytes of the frozen base over those in fp32, embeddings and head among them
    KIND_time_ratio=      as above; KIND_loss_gap= its loss less fp32's, on random weights
    KIND_gradient_error=  of the adapter's gradient, against the one on the dequantised weights

AdamW over 4 million numbers, its moments in memory and on disk (train.optimizer_offload):

    offload_plain_memory_mb=, offload_disk_memory_mb=   memory that a first step takes and that is in no file
    offload_disk_time_ratio=   CPU seconds of later steps, over those in memory; offload_same_bits= whether they are the same

S (small.py; or the model given) with its layers compiled (train.compile), once compiled, against plain layers:

    compile_time_ratio=   seconds of a pass over plain's; compile_same_ratio= plain's over plain's (A/A)
    compile_seconds=, compile_cpu_seconds=   until the code was there, on a clock, and of all cores with the C++ compiler's
    compile_graphs=       pieces of code; compile_graphs_later= those that passes of other lengths added
    compile_loss_difference=, compile_gradient_error=   as above
    compile_whole_cpu_seconds=, compile_whole_graphs=   with --whole: of the model compiled as one and not by layers

Kernels for packed batches (model.attention), on a GPU:

    attention_auto=       what auto chooses here; attention_NAME_speedup= over a call for each sequence, attention_NAME=none
                          with the reason where it cannot be had

On a CPU bf16 may take minutes, so its products alone are timed, as `train.precision: auto` does:

    bf16_product_ratio=   seconds of a layer's products over those in fp32

The exit code is 1 where compiled layers change a loss or a gradient by more than 1e-5 or compile more for other lengths,
where checkpointing, loss_chunk or the kept prefix changes a loss by more than 1e-5 or a gradient by more
than 1e-5, or one of the first two keeps no less than plain training.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig

import numpy as np  # isort: skip
import torch
from small import S
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.common.errors import UserError
from fedloom.data.batching import Batch, collate
from fedloom.data.tokenization import TokenSequence
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import attach
from fedloom.models.attention.gpu import choose_attention
from fedloom.models.forward import token_losses
from fedloom.models.loading import Base, load_base
from fedloom.models.prefix_cache import PrefixCache
from fedloom.models.quantised import dequantise_model, quantise_model
from fedloom.models.recompute import save_memory
from fedloom.training.compiling import compiled, trouble
from fedloom.training.optimizer import FlatOptimizer
from fedloom.training.precision import autocast, slowdown

#: Name → (checkpointing, loss_chunk, precision).
OPERATORS: dict[str, tuple[bool, int | None, str]] = {
    "checkpointing": (True, None, "fp32"), "loss_chunk": (False, 32, "fp32"), "both": (True, 32, "fp32"),
    "bf16": (False, None, "bf16"), "fp16": (False, None, "fp16"),
}  # fmt: skip
PLAIN = (False, None, "fp32")


def small() -> Base:
    """About 9M weights, of which the embeddings are nearly half."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 16_384}
    model = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True, **shape)
    )
    return Base(model.requires_grad_(False).eval(), None, "")  # type: ignore[arg-type]


def named_s() -> Base:
    """S."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.helpers import tiny

    return Base(tiny.causal_lm(spread=0.05, **S).requires_grad_(False), None, "")  # type: ignore[arg-type]


def once(
    model: AdaptedModel, batch: Batch, operator: tuple[bool, int | None, str]
) -> tuple[float, float, torch.Tensor, int]:
    """(seconds, loss, gradient, bytes kept) of one forward and backward."""
    recompute, chunk, precision = operator
    weights = {p.data_ptr() for p in model.module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.grad.zero_()
    model.module.train()
    clock = (
        time.process_time if model.device.type == "cpu" else time.perf_counter
    )  # the former leaves other processes out
    started = clock()
    with ExitStack() as block:
        block.enter_context(save_memory(model, recompute, chunk))
        with autocast(model.device, precision), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = token_losses(model, batch).mean()
        loss.backward()
    seconds = clock() - started
    model.module.eval()
    return seconds, float(loss.detach()), model.grad.clone(), sum(kept.values())


def prefix(base: Callable[[], Base], batch: Batch, pairs: int) -> bool:
    """Adapters on the last quarter of the layers, with and without the states of the frozen ones. Whether they differ."""
    layers = max(1, base().model.config.num_hidden_layers // 4)
    everywhere, model = attach(base(), AdapterConfig(), 0), attach(base(), AdapterConfig(layers=f"last-{layers}"), 0)
    with tempfile.TemporaryDirectory() as folder:
        cache = PrefixCache(model, Path(folder), 1 << 30)

        def timed(model: AdaptedModel, kept: PrefixCache | None) -> tuple[float, float, torch.Tensor, int]:
            model.prefix = kept
            return once(model, batch, PLAIN)

        rows = [(timed(everywhere, None), timed(model, None), timed(model, cache)) for _ in range(pairs + 1)][1:]
    whole, plain, kept = (statistics.median(row[i][0] for row in rows) for i in range(3))
    loss = abs(rows[-1][2][1] - rows[-1][1][1])
    gradient = float((rows[-1][2][2] - rows[-1][1][2]).norm() / rows[-1][1][2].norm())
    print(f"upper_layers={layers}", f"upper_layers_time_ratio={plain / whole:.2f}", sep="\n")
    print(f"prefix_speedup={plain / kept:.2f}", f"prefix_loss_difference={loss:.1e}", sep="\n")
    print(f"prefix_gradient_error={gradient:.1e}", flush=True)
    return loss > 1e-5 or gradient > 1e-5


def quantised(base: Callable[[], Base], batch: Batch, pairs: int) -> bool:
    """A base in 8 and in 4 bits against the same in fp32. Whether a gradient is not the one on the dequantised weights."""
    bad, plain = False, attach(base(), AdapterConfig(), 0)
    bytes_of = {None: _bytes(plain)}
    for kind in ("int8", "nf4"):
        model, whole = base(), base()
        for made in (model, whole):
            quantise_model(made.model, kind)
        dequantise_model(whole.model, torch.float32)
        model, whole = attach(model, AdapterConfig(), 0), attach(whole, AdapterConfig(), 0)
        bytes_of[kind] = _bytes(model)
        rows = [(once(plain, batch, PLAIN), once(model, batch, PLAIN)) for _ in range(pairs + 1)][1:]
        ratio = statistics.median(b[0] for _, b in rows) / statistics.median(a[0] for a, _ in rows)
        exact = once(whole, batch, PLAIN)[2]
        error = float((rows[-1][1][2] - exact).norm() / exact.norm())
        print(f"{kind}_memory_ratio={bytes_of[kind] / bytes_of[None]:.3f}", f"{kind}_time_ratio={ratio:.2f}", sep="\n")
        print(
            f"{kind}_loss_gap={rows[-1][1][1] - rows[-1][0][1]:.1e}",
            f"{kind}_gradient_error={error:.1e}",
            sep="\n",
            flush=True,
        )
        bad |= error > 1e-5 or bytes_of[kind] >= bytes_of[None]
    return bad


def offload(base: Callable[[], Base], batch: Batch, pairs: int) -> bool:
    """AdamW over 4 million numbers with its moments in memory and in a mapped file. Whether steps differ."""
    found: dict[str, Any] = {}
    for name, where in (("disk", "disk"), ("plain", None)) * pairs:
        config = TrainConfig(steps=1, optimizer_offload=where, optimizer_state="keep")
        parameter = torch.nn.Parameter(torch.ones(4_000_000))
        parameter.grad = torch.full_like(parameter, 0.5)
        before = _anonymous()
        optimizer = FlatOptimizer(config, parameter)
        optimizer.step(1e-3)
        found.setdefault((name, "memory"), _anonymous() - before)  # later ones are given what earlier ones left
        started = time.process_time()
        for _ in range(5):
            optimizer.step(1e-3)
        found.setdefault((name, "time"), []).append(time.process_time() - started)
        found[name, "flat"] = parameter.detach()
        del optimizer
    ratio = statistics.median(found["disk", "time"]) / statistics.median(found["plain", "time"])
    for name in ("plain", "disk"):
        print(f"offload_{name}_memory_mb={found[name, 'memory'] / 1e6:.1f}")
    same = torch.equal(found["plain", "flat"], found["disk", "flat"])
    print(f"offload_disk_time_ratio={ratio:.2f}", f"offload_same_bits={same}", sep="\n", flush=True)
    return not same


def attention(base: Callable[[], Base], batch: Batch, pairs: int) -> bool:
    """Kernels for packed batches on a GPU, in bfloat16, against a call for each sequence. No GPU has run this yet."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"attention_auto={choose_attention('auto', device, torch.bfloat16)}")
    for name in ("flash_attention_2", "flex"):
        try:
            choose_attention(name, device, torch.bfloat16)
        except UserError as error:
            print(f"attention_{name}=none  # {error}")
            continue
        made = base()
        model = attach(Base(made.model.to(device, torch.bfloat16), made.tokenizer, ""), AdapterConfig(), 0)
        found: dict[str, list[tuple[float, float, torch.Tensor, int]]] = {"sdpa": [], name: []}
        for which in ("sdpa", name) * (pairs + 1):
            model.base.attention = which
            found[which].append(once(model, batch.to(device), PLAIN))
        seconds = [statistics.median(row[0] for row in rows[1:]) for rows in found.values()]
        error_of = abs(found[name][-1][1] - found["sdpa"][-1][1])
        print(
            f"attention_{name}_speedup={seconds[0] / seconds[1]:.2f}",
            f"attention_{name}_loss_difference={error_of:.1e}",
        )
    return False


def _batch(size: int, lengths: Sequence[int]) -> Batch:
    draw = np.random.default_rng(0)
    return collate([TokenSequence(draw.integers(3, size, n).astype(np.int32), 1) for n in lengths], packed=True, pad=0)


def _spent() -> float:
    """CPU seconds of this process and of those that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def compiling(base: Callable[[], Base], batch: Batch, pairs: int) -> bool:
    """Compiled layers against plain ones. Whether a gradient differs, or passes of other lengths compile anew."""
    from torch._dynamo.utils import counters

    model = attach(base(), AdapterConfig(), 0)
    size = model.causal_lm.config.vocab_size
    batch = _batch(size, batch.lengths)

    def timed(wanted: bool, given: Batch = batch) -> tuple[float, float, torch.Tensor, int]:
        with compiled(model, wanted):
            return once(model, given, PLAIN)

    timed(False)
    with tempfile.TemporaryDirectory() as folder:  # so that nothing is there from earlier
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        torch.compiler.reset()
        counters.clear()
        clock, cpu = time.perf_counter(), _spent()
        why = trouble(model, TrainConfig(compile=True), True)
        if why:
            print(f"compile=none  # {why}")
            return False
        print(
            f"compile_seconds={time.perf_counter() - clock:.0f}", f"compile_cpu_seconds={_spent() - cpu:.0f}", sep="\n"
        )
        before = counters["stats"]["unique_graphs"]
        rows = [(timed(False), timed(True), timed(False)) for _ in range(pairs + 1)][1:]
        for lengths in ((40,), (33, 33), (90, 7, 61, 12, 5)):
            timed(True, _batch(size, lengths))
        later = counters["stats"]["unique_graphs"] - before
    plain, quick, again = (statistics.median(row[i][0] for row in rows) for i in range(3))
    loss, gradient = abs(rows[-1][1][1] - rows[-1][0][1]), rows[-1][1][2] - rows[-1][0][2]
    error = float(gradient.norm() / rows[-1][0][2].norm())
    print(f"compile_time_ratio={quick / plain:.2f}", f"compile_same_ratio={again / plain:.2f}", sep="\n")
    print(f"compile_graphs={before}", f"compile_graphs_later={later}", sep="\n")
    print(f"compile_loss_difference={loss:.1e}", f"compile_gradient_error={error:.1e}", sep="\n", flush=True)
    return loss > 1e-5 or error > 1e-5 or later > 0


def compiling_whole(base: Callable[[], Base], batch: Batch) -> None:
    """What the other way would take: the decoder's own forward compiled, all of its layers in it."""
    from torch._dynamo.utils import counters

    model = attach(base(), AdapterConfig(), 0)
    batch = _batch(model.causal_lm.config.vocab_size, batch.lengths)
    decoder: Any = model.causal_lm.base_model
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        torch.compiler.reset()
        counters.clear()
        cpu = _spent()
        decoder.forward = torch.compile(decoder.forward, dynamic=True)
        once(model, batch, PLAIN)
        print(f"compile_whole_cpu_seconds={_spent() - cpu:.0f}")
        print(f"compile_whole_graphs={counters['stats']['unique_graphs']}", flush=True)


def _anonymous() -> int:
    """Bytes of this process that are in no file, and so have to stay in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _bytes(model: AdaptedModel) -> int:
    """Of the frozen base: its weights, scales with them."""
    return sum(t.nbytes for t in model.frozen_tensors().values())


#: Operators that need a model of their own.
CASES: dict[str, Callable[[Callable[[], Base], Batch, int], bool]] = {
    "prefix": prefix, "quantised": quantised, "offload": offload, "attention": attention,
    "compile": compiling,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", help="one case by its name")
    parser.add_argument("--whole", action="store_true", help="with compile: the whole model as well")
    given = parser.parse_args()

    def make() -> Base:
        return load_base(ModelConfig(name=given.model)) if given.model else small()

    base = make()
    model = attach(base, AdapterConfig(), 0)
    draw = np.random.default_rng(0)
    size = base.model.config.vocab_size
    lengths = np.clip(draw.lognormal(np.log(120), 0.6, 4), 32, 512).astype(int)
    batch = collate([TokenSequence(draw.integers(3, size, n).astype(np.int32), 1) for n in lengths], packed=True, pad=0)
    print(f"weights={sum(p.numel() for p in base.model.parameters())}", f"tokens={batch.tokens}", sep="\n")
    bad = False
    once(model, batch, PLAIN)
    for name, operator in OPERATORS.items():
        if (model.device.type == "cpu" and operator[2] != "fp32") or given.only not in {None, name}:
            continue
        once(model, batch, operator)
        pairs = [(once(model, batch, PLAIN), once(model, batch, operator)) for _ in range(given.pairs)]
        plain, other = pairs[-1]
        ratio = statistics.median(b[0] for _, b in pairs) / statistics.median(a[0] for a, _ in pairs)
        loss, gradient = abs(other[1] - plain[1]), float((other[2] - plain[2]).norm() / plain[2].norm())
        print(f"{name}_time_ratio={ratio:.2f}", f"{name}_kept_ratio={other[3] / plain[3]:.3f}", sep="\n")
        print(f"{name}_loss_difference={loss:.1e}", f"{name}_gradient_error={gradient:.1e}", sep="\n", flush=True)
        exact = operator[2] == "fp32"
        bad |= exact and (loss > 1e-5 or gradient > 1e-5 or other[3] >= plain[3])
    for name, case in CASES.items():
        if given.only in {None, name}:
            bad |= case(named_s if name == "compile" and not given.model else make, batch, given.pairs)
    if given.whole:
        compiling_whole(make if given.model else named_s, batch)
    if given.only is None:
        print(f"bf16_product_ratio={slowdown(model.device, 'bf16'):.1f}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
