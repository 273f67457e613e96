"""Train several clients in one forward and one backward pass over their common base.

Each client has a seat: its own live adapter, with its own gradient, on the common frozen base. A client runs the same
code on its seat as when it trains alone. Where that code calls the model, it waits for all other clients; then one pass
serves them all:

    client 1: ids ─┐   the base's layers, once over all tokens      ┌─ logits, own loss, own backward ─┐   one backward
    client 2: ids ─┼─  x·W                                          ┼─ …                               ┼─  through the
    client 3: ids ─┘   each LoRA layer: x_k·A_kᵀ·B_kᵀ, segment by k └─ …                               ┘   base

A client's loss reaches only its own adapter, and every operation of the base works on each token or each sequence
separately. So a client's gradient equals the one that it gets alone, up to rounding, and a loss that is not finite
affects only its own client. Clipping, schedule, optimiser, skipped steps and the algorithm's three hooks are in the
client's own code, which does not know cohorts. Clients may take different numbers of steps.

Passes without gradients are not shared: they run at once, for one seat. A cohort supports plain LoRA without dropout, in
padding-free batches (`refusal`). This file does not know clients, rounds or algorithms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from fedloom.common.randomness import fork_torch
from fedloom.models.adapters import AdaptedModel
from fedloom.models.layout import Adapter
from fedloom.models.lowrank import find_lora_pairs
from fedloom.training.lockstep import Runner, stop_all

T = TypeVar("T")


#: Seats begin at multiples of this many numbers in their common buffer, 64 bytes.
ALIGNED = 16


class Seat(AdaptedModel):
    """One client's live adapter on the common base. All but adapter and gradient is shared by all seats."""

    def __init__(
        self, model: AdaptedModel, cohort: Cohort, number: int, flat: torch.Tensor, grad: torch.Tensor
    ) -> None:
        self.__dict__.update(model.__dict__)
        self.module = _Place(model.module, cohort, number)
        self.adapter = Adapter(model.adapter.layout, flat=flat)
        self.grad = grad
        self.parameter = torch.nn.Parameter(flat)
        self.parameter.grad = grad
        self.backward = self._backward

    def _backward(self, loss: torch.Tensor) -> None:
        """Run backward to this client's own logits; then, with all other clients, through the base."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.module.joined()


class _Place:
    """The model that a seat calls: it forwards calls to the cohort."""

    def __init__(self, module: Any, cohort: Cohort, number: int) -> None:
        self._module, self._cohort, self._number = module, cohort, number

    def __call__(self, **inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._cohort.alone(self._number, inputs)
        return SimpleNamespace(logits=self._cohort.forward(self._number, inputs)[None])

    def joined(self) -> None:
        self._cohort.backward(self._number)

    def train(self, mode: bool = True) -> None:
        """Do nothing: the cohort sets the mode for all seats at once."""

    def eval(self) -> None:
        """Do nothing, like `train`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclass(frozen=True)
class _Part:
    """A seat's tokens in a pass: [start, end)."""

    seat: int
    start: int
    end: int


@dataclass
class _Pass:
    """A forward pass before its backward pass. `own`: seat → its logits, detached from the graph."""

    parts: list[_Part]
    logits: torch.Tensor
    own: dict[int, torch.Tensor]

    def gradient(self) -> torch.Tensor:
        """Return the gradients of all seats' logits, [S, vocabulary]; zeros for a seat that ran no backward."""
        found = [x.grad if x.grad is not None else torch.zeros_like(x) for x in self.own.values()]
        return torch.cat(found)


class Cohort:
    """Seats on one base.

    Attributes:
        seats: `size` of them.
    """

    def __init__(self, model: AdaptedModel, size: int) -> None:
        stride = -(-model.adapter.layout.numel // ALIGNED) * ALIGNED
        bank, gradients = (torch.zeros(size, stride, device=model.device) for _ in range(2))
        numel = model.adapter.layout.numel
        self._model = model
        self.seats = [Seat(model, self, k, bank[k, :numel], gradients[k, :numel]) for k in range(size)]
        self._layers = [_Layer(found, bank, gradients) for found in lora_layers(model)]
        self._running: dict[int, Runner[Any]] = {}
        self._asked: dict[int, dict[str, Any]] = {}  # seat → inputs that wait for the forward pass
        self._given: dict[int, torch.Tensor] = {}  # seat → its logits of the last forward pass
        self._open: list[_Pass] = []  # forward passes without their backward pass
        self._settled: set[int] = set()  # seats that wait for the backward pass

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Run all jobs until the last one ends; returns their results. Job k trains seat k.

        If a job raises, the others are ended and its exception is raised. A job that may fail returns its failure.
        """
        assert len(jobs) <= len(self.seats), f"{len(jobs)} jobs for {len(self.seats)} seats"
        runners = [Runner(job) for job in jobs]
        self._running = dict(enumerate(runners))
        self._model.module.train()
        try:
            with self._grouped(), fork_torch(0, "dropout"):  # each job forks it too, but they do not end in order
                while self._running:
                    for number in [n for n in self._running if n not in self._asked and n not in self._settled]:
                        self._running[number].go_on()
                        if self._running[number].done:
                            self._check_joined(number)
                            del self._running[number]
                    if self._asked:
                        self._forward()
                    else:
                        self._backward()
        finally:
            stop_all(runners)
            self._model.module.eval()
            self._running, self._asked, self._given, self._open, self._settled = {}, {}, {}, [], set()
        return [runner.result for runner in runners]

    # ------------------------------------------------------------------ called by seats

    def forward(self, number: int, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Wait for the common forward pass; returns the logits of this seat's batch: [S, vocabulary], a leaf."""
        self._check_joined(number)
        self._asked[number] = dict(inputs)
        self._running[number].pause()
        return self._given.pop(number)

    def backward(self, number: int) -> None:
        """Wait until the common backward pass through the base is done."""
        self._settled.add(number)
        self._running[number].pause()

    def alone(self, number: int, inputs: Mapping[str, Any]) -> Any:
        """Run a pass of this seat only, at once and without gradients."""
        self._divide([_Part(number, 0, inputs["input_ids"].shape[1])])
        return self._model.module(**inputs)

    def _check_joined(self, number: int) -> None:
        """Raise RuntimeError where a loss ran backward only to the seat's own logits."""
        passes = [p.own[number] for p in self._open if number in p.own]
        if any(logits.grad is not None for logits in passes):
            raise RuntimeError(
                "a loss ran backward by itself in a cohort, where the base is shared: use model.backward(loss)"
            )

    # ------------------------------------------------------------------ common passes

    def _forward(self) -> None:
        """Run one forward pass over all waiting batches."""
        asked, self._asked = dict(sorted(self._asked.items())), {}
        parts, where, start = [], [], 0
        for number, inputs in asked.items():
            end = start + inputs["input_ids"].shape[1]
            parts.append(_Part(number, start, end))
            where.append(inputs["logits_to_keep"] + start)
            start = end
        self._divide(parts)
        logits = self._model.module(
            input_ids=torch.cat([i["input_ids"] for i in asked.values()], dim=1),
            position_ids=torch.cat([i["position_ids"] for i in asked.values()], dim=1),
            segment_lengths=tuple(n for i in asked.values() for n in i["segment_lengths"]),
            logits_to_keep=torch.cat(where),
            use_cache=False,
        ).logits[0]
        split = torch.split(logits.detach(), [len(w) for w in where])
        own = {number: part.requires_grad_() for number, part in zip(asked, split, strict=True)}
        self._given.update(own)
        self._open.append(_Pass(parts, logits, own))

    def _backward(self) -> None:
        """Run backward through the base, once for each open pass. Its parts are set again for recomputed layers."""
        for done in self._open:
            self._divide(done.parts)
            done.logits.backward(done.gradient())  # type: ignore[no-untyped-call]
        self._open, self._settled = [], set()

    def _divide(self, parts: list[_Part]) -> None:
        """Set in every layer which tokens of the next pass are whose."""
        lengths = {p.end - p.start for p in parts}
        equal = lengths.pop() if len(parts) == len(self.seats) and len(lengths) == 1 else 0
        for layer in self._layers:
            layer.parts, layer.equal = parts, equal

    @contextmanager
    def _grouped(self) -> Iterator[None]:
        """Within the block, the base's LoRA layers apply the seats' adapters instead of the model's own."""
        try:
            for layer in self._layers:
                layer.module.forward = layer.forward
            yield
        finally:
            for layer in self._layers:
                vars(layer.module).pop("forward", None)


# ---------------------------------------------------------------------- a LoRA layer for several clients


@dataclass(frozen=True)
class _Found:
    """A LoRA layer of the model: peft's module, s, and the positions of A and B in the flat buffer."""

    module: Any
    scale: float
    a: tuple[int, torch.Size]
    b: tuple[int, torch.Size]


def lora_layers(model: AdaptedModel) -> list[_Found]:
    """Find the LoRA layers that the adapter's tensors belong to."""
    layout, scales = model.adapter.layout, model.lora_scales()
    modules = {f"{name}.weight": module for name, module in model.causal_lm.named_modules()}
    return [
        _Found(
            modules[p.weight],
            scales[p.weight],
            (layout.offsets[p.a], layout.shapes[p.a]),
            (layout.offsets[p.b], layout.shapes[p.b]),
        )
        for p in find_lora_pairs(layout.names)
    ]


class _Layer:
    """y_k = x_k·Wᵀ + s·(x_k·A_kᵀ)·B_kᵀ for the tokens x_k of each seat.

    Attributes:
        a, b: [seats, rank, in] and [seats, out, rank], windows into the seats' buffers.
        a_grad, b_grad: windows into their gradients.
        parts: each seat's tokens in the current pass.
        equal: the length of every seat's part, if all seats take part with equal lengths; else 0.
    """

    def __init__(self, found: _Found, bank: torch.Tensor, gradients: torch.Tensor) -> None:
        self.module, self.scale = found.module, found.scale
        self.a, self.b = _stacked(bank, found.a), _stacked(bank, found.b)
        self.a_grad, self.b_grad = _stacked(gradients, found.a), _stacked(gradients, found.b)
        self.parts: list[_Part] = []
        self.equal = 0
        self._plain = found.module.forward
        self._anchor = torch.zeros((), device=bank.device, requires_grad=True)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: [1, T, in] → [1, T, out]."""
        if self.module.disable_adapters:
            plain: torch.Tensor = self._plain(x, *args, **kwargs)
            return plain
        y: torch.Tensor = self.module.base_layer(x, *args, **kwargs)
        if x.numel() != self.parts[-1].end * x.shape[-1]:
            raise ValueError(f"an adapted layer sees {tuple(x.shape)} of a pass of {self.parts[-1].end} tokens")
        sum_: torch.Tensor = _Grouped.apply(y.float(), x.float(), self._anchor, self)  # type: ignore[no-untyped-call]
        return sum_.to(y.dtype)


def _stacked(bank: torch.Tensor, place: tuple[int, torch.Size]) -> torch.Tensor:
    """Return a view of one tensor of every seat, [seats, *shape], into the seats' common buffer."""
    offset, shape = place
    return bank[:, offset : offset + shape.numel()].view(len(bank), *shape)


class _Grouped(torch.autograd.Function):
    """y + s·(x_k·A_kᵀ)·B_kᵀ, part by part, written into y [1, T, out]; x [1, T, in].

    Low-rank tensors have the rank first, low = A_k·x_kᵀ [rank, T_k]: products with few rows are two to four times as fast
    on a CPU as the same ones with few columns. Equal parts use batched products, others a loop over the parts;
    benchmarks/cohort.py measures both. (Padding unequal parts to one length would copy x in every layer.) The gradients
    of A_k and B_k go straight into the seats' buffers. `anchor` makes the output require a gradient in the first layer,
    whose x requires none.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, layer: _Layer) -> torch.Tensor:
        ctx.layer, ctx.parts, ctx.equal = layer, layer.parts, layer.equal
        ctx.mark_dirty(y)
        out = y.view(-1, y.shape[-1])
        if ctx.equal:
            stack = len(layer.a), ctx.equal, -1
            low = torch.bmm(layer.a, x.reshape(stack).transpose(1, 2))  # [seats, rank, T_k]
            out.view(stack).baddbmm_(low.transpose(1, 2), layer.b.transpose(1, 2), alpha=layer.scale)
        else:
            rows = x.reshape(-1, x.shape[-1])
            low = x.new_empty(layer.a.shape[1], len(rows))
            for p in layer.parts:
                at = slice(p.start, p.end)
                torch.mm(layer.a[p.seat], rows[at].t(), out=low[:, at])
                out[at].addmm_(low[:, at].t(), layer.b[p.seat].t(), alpha=layer.scale)
        ctx.save_for_backward(x, low)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,), (x, low), layer = gradients, ctx.saved_tensors, ctx.layer
        if ctx.equal:
            stack = len(layer.a), ctx.equal, -1
            g_k, x_k = g.reshape(stack), x.reshape(stack)
            g_low = torch.bmm(layer.b.transpose(1, 2), g_k.transpose(1, 2)).mul_(layer.scale)  # [seats, rank, T_k]
            layer.b_grad.add_(torch.bmm(low, g_k).transpose(1, 2), alpha=layer.scale)
            layer.a_grad.add_(torch.bmm(g_low, x_k))
            return g, torch.bmm(g_low.transpose(1, 2), layer.a).view(x.shape), None, None
        g_rows, rows = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        g_x = torch.empty_like(rows)
        for p in ctx.parts:
            at = slice(p.start, p.end)
            g_low = layer.b[p.seat].t().mm(g_rows[at].t()).mul_(layer.scale)
            layer.b_grad[p.seat].add_(low[:, at].mm(g_rows[at]).t(), alpha=layer.scale)
            layer.a_grad[p.seat].addmm_(g_low, rows[at])
            torch.mm(g_low.t(), layer.a[p.seat], out=g_x[at])
        return g, g_x.view(x.shape), None, None
