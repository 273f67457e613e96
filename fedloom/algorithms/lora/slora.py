"""SLoRA: sparse fine-tuning of the base weights in the first rounds, then LoRA that starts from their result.

Babakniya et al., "SLoRA: Federated Parameter Efficient Fine-Tuning of Language Models", arXiv 2308.06522:

    stage 1   a random mask, the same for all clients; W₀ + mask∘V trains, V is averaged
    between   SVD of ΔW = mask∘V̄ = U Σ Vᵀ:   s·B = U_r √Σ_r,  A = √Σ_r V_rᵀ; the base weights are W₀ again
    stage 2   FedAvg of LoRA from there

Here the mask covers the weights that have an adapter. Both sides draw it from the recipe's seed. By default it has as many
entries as LoRA has numbers, so a round costs the same traffic in both stages. In stage 1 only the values of V travel, in
stage 2 both factors. Not implemented: the paper's masks that avoid weights frozen elsewhere, its tuned lengths of the
stages, and the other trainable parts (heads, norms) of its classification models. Stage 1 needs memory for the gradient
of one whole weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import NUMBER, About, Sizes
from fedloom.algorithms.averaging import fedavg
from fedloom.algorithms.lora.base import METHODS, LoRAAlgorithm
from fedloom.algorithms.lora.flexlora import split
from fedloom.common.errors import UserError
from fedloom.common.randomness import torch_generator
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.layout import Adapter, Layout, WeightedMean
from fedloom.models.lowrank import find_lora_pairs, subspace_iteration
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig
from fedloom.training.trainer import FitResult, LocalRun

SPARSE = "sparse/"


def _sparse(sizes: Sizes) -> int:
    """Bytes of V under the mask."""
    density = sizes.options.density
    if density is None:
        return sizes.delta(sizes.rank)
    shapes = ((sizes.layout.shapes[p.b][0], sizes.layout.shapes[p.a][1]) for p in find_lora_pairs(sizes.layout.names))
    return sum(NUMBER * max(1, round(density * rows * columns)) for rows, columns in shapes)


def _stage(sizes: Sizes) -> int:
    return _sparse(sizes) if sizes.round <= sizes.options.sparse_rounds else sizes.adapter


class SLoRA(LoRAAlgorithm):
    """Attributes:
    sparse: V under the mask, weight → [entries]; the server's average, or a client's own.
    finished: server half: rounds aggregated.
    """

    properties: ClassVar = base.Properties(
        linear_sum=True,
        methods=METHODS,
        neutral={"sparse_rounds": 0},
        parallel=frozenset({"ddp"}),
        weights=True,
        cohorts=False,
    )
    about: ClassVar = About(
        "lora",
        "entries of W; then A and B",
        "Babakniya et al. 2023, arXiv 2308.06522",
        up=_stage,
        down=_stage,
        server=lambda s: s.adapter + _sparse(s),
    )

    class Options(fedavg.FedAvg.Options):
        sparse_rounds: int = Field(1, ge=0, description="rounds of the sparse stage; 0 is LoRA from the start")
        density: float | None = Field(
            None,
            gt=0,
            le=1,
            description="share of a weight's entries under the mask; null: as many as LoRA has numbers",
        )

    options: Options

    finished = 0

    @classmethod
    def check(cls, options: Any, adapter: AdapterConfig, train: TrainConfig, model: ModelConfig) -> None:
        if model.dtype != "float32":
            raise UserError(
                f"slora trains base weights, which must be float32, but model.dtype={model.dtype}: "
                "set model.dtype=float32"
            )

        if train.precision in {"fp16", "auto"}:
            raise UserError(
                f"slora sums gradients before the loss scale is divided out, so it cannot be used with "
                f"train.precision={train.precision}: set train.precision=fp32 or bf16"
            )

    def _known(self, model: AdaptedModel) -> AdaptedModel:
        model = super()._known(model)
        weights = model.base_weights()
        self.shapes = {p.weight: weights[p.weight].shape for p in self.pairs}
        self.transposed = model.transposed_weights()
        entries, self.mask = {}, {}
        for weight, (rows, columns) in self.shapes.items():
            budget = self.adapter.rank * (rows + columns)
            if self.options.density is not None:
                budget = round(self.options.density * rows * columns)
            entries[SPARSE + weight] = (min(rows * columns, max(1, budget)),)
            order = torch.randperm(rows * columns, generator=torch_generator(self.seed, "init", client=weight))
            self.mask[weight] = order[: entries[SPARSE + weight][0]].sort().values.to(model.device)
        self.sparse = Adapter(Layout(entries), model.device)
        return model

    def dense(self, weight: str) -> torch.Tensor:
        """Return mask∘V of one weight as [out, in], also if the model stores it transposed."""
        values = self.sparse.views[SPARSE + weight]
        whole = torch.zeros(self.shapes[weight].numel(), device=values.device)
        stored = whole.index_copy_(0, self.mask[weight], values).view(self.shapes[weight])
        return stored.T.contiguous() if weight in self.transposed else stored

    # ------------------------------------------------------------------ server

    @property
    def in_first_stage(self) -> bool:
        return self.finished < self.options.sparse_rounds

    def layout_for(self, client: str) -> Layout:
        return self.sparse.layout if self.in_first_stage else self.shared.layout

    def round_payload(self, client: str) -> Payload:
        return Payload((self.sparse if self.in_first_stage else self.shared).tensors())

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        average = self.sparse if self.in_first_stage else self.shared
        mean = WeightedMean(average.layout)
        for update in updates:
            mean.add(update.payload.tensors, self.options.weight(update))
        average.copy_(mean.result())
        self.finished += 1
        return {"kept": self._begin_lora()} if self.finished == self.options.sparse_rounds else {}

    def _begin_lora(self) -> float:
        """Set the first factors from ΔW of the sparse stage; return the share of its norm that rank r keeps."""
        first = self.model.initial_adapter().views
        kept, size = 0.0, 0.0
        for pair in self.pairs:
            change = self.dense(pair.weight).double().cpu()
            unused = first[pair.a].double()
            found = subspace_iteration(
                change, len(unused), torch_generator(self.seed, "init", client=f"svd/{pair.weight}")
            )
            start = split(found, unused)
            self.shared.views[pair.b].copy_(start.b / self.scales[pair.weight])
            self.shared.views[pair.a].copy_(start.a)
            kept, size = kept + found.norm() ** 2, size + float(change.norm()) ** 2
        return float((kept / size) ** 0.5) if size else 0.0

    def deployed(self, client: str | None = None) -> base.Deployed:
        delta = {p.weight: self.dense(p.weight) for p in self.pairs} if client is None and self.in_first_stage else None
        return base.Deployed(super().deployed(client).adapter, delta)

    def server_state(self) -> Payload:
        tensors = {**super().server_state().tensors, **self.sparse.tensors()}
        return Payload(tensors, {"finished": self.finished})

    def load_server_state(self, state: Payload) -> None:
        self.load_shared(state)
        self.sparse.load({n: t for n, t in state.tensors.items() if n.startswith(SPARSE)})
        self.finished = int(state.meta["finished"])

    # ------------------------------------------------------------------ client

    def receive(self, payload: Payload) -> None:
        self.training_sparse = any(n.startswith(SPARSE) for n in payload.tensors)
        if not self.training_sparse:
            self.model.set_base_delta(None)
            super().receive(payload)
            return
        self.sparse.load(payload.tensors)
        self.model.adapter.copy_(self.model.initial)  # B = 0: the adapter adds nothing
        self.model.set_base_delta(None)
        weights = self.model.base_weights()
        self.original = {w: weights[w].detach().view(-1)[at].float() for w, at in self.mask.items()}
        self.model.set_base_delta({w: self.dense(w) for w in self.mask})

    def local_training(self, run: LocalRun) -> FitResult:
        if not self.training_sparse:
            return run.fit(self)
        parameter = torch.nn.Parameter(self.sparse.flat)
        parameter.grad = torch.zeros_like(self.sparse.flat)
        self.step_gradient, self.gathered = parameter.grad, torch.zeros_like(parameter.grad)
        self.ranks = run.ranks
        views, weights = self.sparse.layout.views(self.gathered), self.model.base_weights()
        hooks = []
        try:
            for weight in self.mask:
                weights[weight].requires_grad_(True)
                gather = partial(self._gather, views[SPARSE + weight], self.mask[weight])
                hooks.append(weights[weight].register_post_accumulate_grad_hook(gather))  # type: ignore[no-untyped-call]
            return run.fit(self, parameter)
        finally:
            for hook in hooks:
                hook.remove()
            for weight in self.mask:
                weights[weight].requires_grad_(False)

    @staticmethod
    def _gather(into: torch.Tensor, at: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the gradient under the mask to `into`, and free the whole gradient before the next weight's is computed."""
        assert weight.grad is not None
        into.add_(weight.grad.reshape(-1)[at])
        weight.grad = None

    def before_step(self, model: AdaptedModel) -> None:
        if self.training_sparse:
            self.ranks.sum_(self.gathered)
            self.step_gradient.copy_(self.gathered)
            self.gathered.zero_()

    def after_step(self, model: AdaptedModel) -> None:
        if not self.training_sparse:
            return
        weights = model.base_weights()
        for weight, at in self.mask.items():
            now = self.original[weight] + self.sparse.views[SPARSE + weight]
            weights[weight].data.view(-1).index_copy_(0, at, now.to(weights[weight].dtype))

    def shared_state(self) -> Payload:
        return Payload(self.sparse.tensors()) if self.training_sparse else super().shared_state()
