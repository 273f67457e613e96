"""Describe an algorithm to people: its family, its paper, what travels, what each side keeps.

Bytes are functions of a federation's `Sizes`, not numbers, so they hold for any model. They count the tensors in a
message or a state. `tests/algorithms/test_about.py` runs rounds of every registered algorithm and compares these bytes
with what was encoded and kept. `fedloom algorithms` and docs/algorithms/README.md print them for one federation
(`reference`). This file does not know any algorithm by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedloom.models.emulator.cut import thin_middle
from fedloom.models.layout import Layout
from fedloom.models.lowrank import A_END, B_END, find_lora_pairs
from fedloom.recipe.adapter import AdapterConfig

#: Family → its heading in tables, in the order of the tables.
FAMILIES = {
    "averaging": "averaging and server optimisers",
    "robust": "robust rules",
    "lora": "LoRA-aware aggregation",
    "personalised": "personalised",
    "low-traffic": "very little traffic",
    "offsite": "without the full model",
    "baseline": "baselines",
}


NUMBER = 4  # bytes of a float32


@dataclass(frozen=True)
class Sizes:
    """What the traffic of one round depends on.

    Attributes:
        layout: the adapter's tensors, at the recipe's rank.
        rank: LoRA's r, the same for all clients.
        clients: how many clients train; all of them train in every round.
        round: the number of the round, from 1.
        steps: optimiser steps of one client in one round.
        options: the algorithm's own options.
    """

    layout: Layout
    rank: int
    clients: int
    round: int
    steps: int
    options: Any

    def part(self, wanted: Callable[[str], bool]) -> int:
        """Bytes of the adapter's tensors whose name is `wanted`."""
        return NUMBER * sum(shape.numel() for name, shape in self.layout.shapes.items() if wanted(name))

    @property
    def adapter(self) -> int:
        """Bytes of the whole adapter."""
        return NUMBER * self.layout.numel

    @property
    def a(self) -> int:
        """Bytes of LoRA's A factors."""
        return self.part(lambda name: name.endswith(A_END))

    @property
    def b(self) -> int:
        """Bytes of LoRA's B factors."""
        return self.part(lambda name: name.endswith(B_END))

    @property
    def modules(self) -> int:
        """Number of layers that have a pair of factors."""
        return len(find_lora_pairs(self.layout.names))

    def delta(self, rank: int) -> int:
        """Bytes of a change of this rank to every adapted weight: as factors, or dense where that is smaller."""
        total = 0
        for pair in find_lora_pairs(self.layout.names):
            rows, columns = self.layout.shapes[pair.b][0], self.layout.shapes[pair.a][1]
            total += NUMBER * min(rank * (rows + columns), rows * columns)
        return total

    @property
    def outer(self) -> int:
        """Bytes of the part in the model's outer layers, which the options `bottom` and `top` define."""
        bottom, top, total = self.options.bottom, self.options.top, self._layers()
        return self.part(lambda name: not bottom <= _layer(name) < total - top)

    @property
    def emulator(self) -> int:
        """Bytes (float32) of the middle's own weights that `dropped` leaves, for a Llama with two norms per layer."""
        bottom, top, total = self.options.bottom, self.options.top, self._layers()
        kept = thin_middle(range(bottom, total - top), self.options.dropped)
        count = 0
        for pair in find_lora_pairs(self.layout.names):
            rows, columns = self.layout.shapes[pair.b][0], self.layout.shapes[pair.a][1]
            if _layer(pair.a) in kept:
                count += rows * columns + (2 * columns if pair.a.endswith("q_proj" + A_END) else 0)
        return NUMBER * count

    def _layers(self) -> int:
        return 1 + max(_layer(name) for name in self.layout.names)


def _layer(name: str) -> int:
    """The decoder layer that a tensor belongs to: the first number in its name."""
    return next(int(part) for part in name.split(".") if part.isdigit())


Bytes = Callable[[Sizes], int]


def whole(sizes: Sizes) -> int:
    """Bytes of the whole adapter."""
    return sizes.adapter


def nothing(sizes: Sizes) -> int:
    """No bytes."""
    return 0


@dataclass(frozen=True)
class About:
    """What a class declares about one algorithm. Each class has its own; none is inherited.

    Attributes:
        family: a key of `FAMILIES`.
        travels: what goes up and down, in at most 26 characters, for a table.
        paper: first author and year, then ``arXiv ID``; empty if there is no paper.
        up, down: bytes of the tensors in one client's update, and in what it receives before it trains.
        server, client: bytes that each keeps from one round to the next, in addition to the recipe and the model. A
            client's optimiser state is not counted, because it depends on the recipe and not on the algorithm.
        at_most: whether `up` and `down` are upper bounds.
    """

    family: str
    travels: str
    paper: str = ""
    up: Bytes = whole
    down: Bytes = whole
    server: Bytes = whole
    client: Bytes = nothing
    at_most: bool = False

    @property
    def arxiv(self) -> str:
        """The paper's arXiv id; empty if there is none."""
        return self.paper.rpartition("arXiv ")[2] if "arXiv " in self.paper else ""


#: A Llama's linear layers: name → input and output width, as keys of `WIDTHS`.
_LINEAR = {
    "self_attn.q_proj": ("hidden", "hidden"),
    "self_attn.k_proj": ("hidden", "kv"),
    "self_attn.v_proj": ("hidden", "kv"),
    "self_attn.o_proj": ("hidden", "hidden"),
    "mlp.gate_proj": ("hidden", "inner"),
    "mlp.up_proj": ("hidden", "inner"),
    "mlp.down_proj": ("inner", "hidden"),
}


#: Widths of SmolLM2-135M, the built-in model. Printing a table does not load it.
WIDTHS = {"hidden": 576, "kv": 192, "inner": 1536}


LAYERS = 30


#: The federation that tables are printed for.
REFERENCE = "SmolLM2-135M, LoRA of rank 8 on every linear layer, 8 clients of 8 steps, the second round"


def reference(options: Any) -> Sizes:
    """Return the sizes of the federation that `REFERENCE` describes."""
    rank = AdapterConfig().rank
    shapes = {}
    for layer in range(LAYERS):
        for name, (into, out) in _LINEAR.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            shapes[stem + A_END] = (rank, WIDTHS[into])
            shapes[stem + B_END] = (WIDTHS[out], rank)
    return Sizes(Layout(shapes), rank, clients=8, round=2, steps=8, options=options)
