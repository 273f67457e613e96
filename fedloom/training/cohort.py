"""Several clients' training in one forward and one backward pass over the base that they share.

Each client has a seat: a live adapter of its own, with its own gradient, on the common frozen base. What a client does
with its seat is what it does alone, the same code from the first line to the last; only where it would call the model
it waits until all others have come as far, and then one pass serves them all:

    client 1: ids ─┐   the base's layers, once over all tokens      ┌─ logits, own loss, own backward ─┐   one backward
    client 2: ids ─┼─  x·W                                          ┼─ …                               ┼─  through the
    client 3: ids ─┘   each LoRA layer: x_k·A_kᵀ·B_kᵀ, segment by k └─ …                               ┘   base

A client's loss reaches its own adapter and nobody else's, and every operation of the base works on each token or each
sequence by itself, so a client's gradient is what it is alone, but for rounding; a loss that is not finite stays its
own. Clipping, schedule, optimiser, skipped steps and the algorithm's three hooks are in the client's own code, which
knows nothing of this. Clients may take different numbers of steps: who is done leaves its place empty.

Passes without gradients are not shared: they run at once, for one seat. What can sit in a cohort is plain LoRA without
dropout, in padding-free batches (`refusal`). This file does not know clients, rounds or algorithms.
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
    """One client's live adapter on the common base. What stands outside of adapter and gradient belongs to all seats."""

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
        """As far as this client's own logits, and with all others through the base."""
        loss.backward()  # type: ignore[no-untyped-call]
        self.module.joined()


class _Place:
    """What a seat calls as its model."""

    def __init__(self, module: Any, cohort: Cohort, number: int) -> None:
        self._module, self._cohort, self._number = module, cohort, number

    def __call__(self, **inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._cohort.alone(self._number, inputs)
        return SimpleNamespace(logits=self._cohort.forward(self._number, inputs)[None])

    def joined(self) -> None:
        self._cohort.backward(self._number)

    def train(self, mode: bool = True) -> None:
        """The cohort sets the mode, for all at once."""

    def eval(self) -> None:
        """As `train`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclass(frozen=True)
class _Part:
    """Which tokens of a pass are a seat's: [start, end)."""

    seat: int
    start: int
    end: int


@dataclass
class _Pass:
    """A forward pass whose backward has not come. `own`: seat → its logits, cut off from the graph."""

    parts: list[_Part]
    logits: torch.Tensor
    own: dict[int, torch.Tensor]

    def gradient(self) -> torch.Tensor:
        """[S, vocabulary]: what each seat's own backward left, zeros where there was none."""
        found = [x.grad if x.grad is not None else torch.zeros_like(x) for x in self.own.values()]
        return torch.cat(found)


class Cohort:
    """Seats on one base.

    Attributes:
        seats: as many as the cohort has places.
    """

    def __init__(self, model: AdaptedModel, size: int) -> None:
        stride = -(-model.adapter.layout.numel // ALIGNED) * ALIGNED
        bank, gradients = (torch.zeros(size, stride, device=model.device) for _ in range(2))
        numel = model.adapter.layout.numel
        self._model = model
        self.seats = [Seat(model, self, k, bank[k, :numel], gradients[k, :numel]) for k in range(size)]
        self._layers = [_Layer(found, bank, gradients) for found in lora_layers(model)]
        self._running: dict[int, Runner[Any]] = {}
        self._asked: dict[int, dict[str, Any]] = {}  # seat → the inputs that it waits with
        self._given: dict[int, torch.Tensor] = {}  # seat → the logits that it waited for
        self._open: list[_Pass] = []
        self._settled: set[int] = set()  # seats that wait for the backward pass

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """What the jobs return. Job k trains seat k, with whatever code; together they end when the last one has.

        Raises what a job raises, and ends the others then: failures that are to be survived are the jobs' own values.
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

    # ------------------------------------------------------------------ asked for by seats, in their own turn

    def forward(self, number: int, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Logits of this seat's batch: [S, vocabulary], a leaf, from a pass that all others take part in."""
        self._check_joined(number)
        self._asked[number] = dict(inputs)
        self._running[number].pause()
        return self._given.pop(number)

    def backward(self, number: int) -> None:
        """Wait until the gradient has gone through the base."""
        self._settled.add(number)
        self._running[number].pause()

    def alone(self, number: int, inputs: Mapping[str, Any]) -> Any:
        """A pass of this seat only, at once and without gradients."""
        self._divide([_Part(number, 0, inputs["input_ids"].shape[1])])
        return self._model.module(**inputs)

    def _check_joined(self, number: int) -> None:
        """Raise RuntimeError where a loss went backward and stopped at the seat's own logits."""
        passes = [p.own[number] for p in self._open if number in p.own]
        if any(logits.grad is not None for logits in passes):
            raise RuntimeError(
                "a loss ran backward by itself in a cohort, where the base is shared: use model.backward(loss)"
            )

    # ------------------------------------------------------------------ done for all of them

    def _forward(self) -> None:
        """One pass over all batches that are waited with."""
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
        """Through the base, for all that wait; each pass once, with its own parts, which a recomputed layer asks for."""
        for done in self._open:
            self._divide(done.parts)
            done.logits.backward(done.gradient())  # type: ignore[no-untyped-call]
        self._open, self._settled = [], set()

    def _divide(self, parts: list[_Part]) -> None:
        """Tell every layer whose tokens are which in the pass that comes."""
        lengths = {p.end - p.start for p in parts}
        equal = lengths.pop() if len(parts) == len(self.seats) and len(lengths) == 1 else 0
        for layer in self._layers:
            layer.parts, layer.equal = parts, equal

    @contextmanager
    def _grouped(self) -> Iterator[None]:
        """In this block the base's LoRA layers apply the seats' adapters and not the model's own."""
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
    """A LoRA layer of the model: peft's module, s, and where A and B lie in the flat buffer."""

    module: Any
    scale: float
    a: tuple[int, torch.Size]
    b: tuple[int, torch.Size]


def lora_layers(model: AdaptedModel) -> list[_Found]:
    """Those that the adapter's tensors belong to."""
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
        parts: whose tokens are which, in the pass that is under way.
        equal: the length of every seat's part where all seats take part and all are alike; 0 elsewhere.
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
    """One tensor of every seat, [seats, *shape], in the memory of the seats' common buffer."""
    offset, shape = place
    return bank[:, offset : offset + shape.numel()].view(len(bank), *shape)


class _Grouped(torch.autograd.Function):
    """y + s·(x_k·A_kᵀ)·B_kᵀ, part by part, written into y [1, T, out]; x [1, T, in].

    What has the rank as a side is kept with the rank first, low = A_k·x_kᵀ [rank, T_k]: products with few rows are two to
    four times as fast on a CPU as the same ones with few columns. Equal parts go through batched products, others through
    a loop over the parts; benchmarks/cohort.py measures both. (Padding unequal parts to one length would copy x in
    every layer.) The gradients of A_k and B_k go straight into the seats' buffers. `anchor` makes the output ask for
    a gradient in the first layer, whose x needs none.
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
