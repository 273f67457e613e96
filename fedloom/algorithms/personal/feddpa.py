"""FedDPA: a global adapter that is averaged and a local adapter that stays on the client, added on one base.

Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", arXiv 2403.19211. With LoRA, client k runs

    W + s·(B_g A_g + B_k A_k)

There is one live LoRA buffer, of rank 2r: the first r rows of A (columns of B) are the global adapter, the last r the
local one. Its product is exactly the sum of the two. s is unchanged, because α grows with the rank. An ordinary peft LoRA
of rank 2r is saved for a client.

In a round a client trains twice on the same batches, each time with one half frozen. First it trains the global half with
the local one off (B_k = 0), which is FedAvg on a LoRA of rank r. Then it trains the local half with the global one *as
received*, because the local half is evaluated together with such a global half. Only the global half travels.

The paper weights the two adapters for each test instance, by its similarity to the client's training data. Here both
have weight 1, as in training. The paper also starts the local adapter from a copy of the global one; here it does not.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from fedloom.algorithms import base
from fedloom.algorithms.about import About, whole
from fedloom.algorithms.averaging import fedavg
from fedloom.algorithms.freezing import Frozen
from fedloom.algorithms.personal.turns import Holding, copies, joined, turn
from fedloom.common.errors import UserError
from fedloom.messages.types import Payload
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.layout import Adapter, check_names
from fedloom.models.lowrank import A_END, B_END
from fedloom.recipe.recipe import AdapterConfig
from fedloom.training.trainer import FitResult, LocalRun


class FedDPA(fedavg.FedAvg):
    properties: ClassVar = base.Properties(
        linear_sum=True, personal=True, methods=frozenset({"lora"}), parallel=base.ANY_PARALLEL
    )
    about: ClassVar = About(
        "personalised", "global adapter, both ways", "Yang et al. 2024, arXiv 2403.19211", client=whole
    )

    def server_model(self, models: Models) -> AdaptedModel:
        self.model = models.adapted(doubled(self.adapter))
        self.shared = self._initial_global()
        return self.model

    def client_model(self, models: Models, payload: Payload) -> AdaptedModel:
        self.model = models.adapted(doubled(self.adapter))
        self.shared = self._initial_global()
        return self.model

    def _initial_global(self) -> Adapter:
        initial = self.model.initial_adapter().tensors()
        foreign = [n for n in initial if not n.endswith((A_END, B_END))]
        if foreign:
            raise UserError(
                f"feddpa doubles LoRA's two factors, but the adapter also trains {foreign[0]}: use plain LoRA on linear "
                "layers"
            )
        return Adapter.of({n: self._global(n, t) for n, t in initial.items()})

    def _global(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the global half of a factor of rank 2r: A's first r rows, B's first r columns."""
        rank = self.adapter.rank
        return tensor[:rank] if name.endswith(A_END) else tensor[:, :rank]

    def _local(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the local half of a factor of rank 2r: A's last r rows, B's last r columns."""
        rank = self.adapter.rank
        return tensor[rank:] if name.endswith(A_END) else tensor[:, rank:]

    def receive(self, payload: Payload) -> None:
        check_names(self.shared.layout, payload.tensors)
        live = self.model.adapter
        live.copy_(self.model.initial)  # the local half is initial: B = 0 adds nothing
        for name, tensor in payload.tensors.items():
            self._global(name, live.views[name]).copy_(tensor)
        if self.evaluating:
            self._put_local()

    def _put_local(self) -> None:
        for name, tensor in self.kept.tensors.items():
            self._local(name, self.model.adapter.views[name]).copy_(tensor)

    def local_training(self, run: LocalRun) -> FitResult:
        live = run.model.adapter
        received = live.flat.clone()
        shared = turn(run, "global").fit(Holding(self, Frozen(run.model, live.views, self._local)))
        if not shared.steps:
            return joined({"global": shared}, shared.loss)  # nothing was learned: the client fails
        trained = live.flat.clone()
        live.copy_(received)
        self._put_local()
        own = turn(run, "local").fit(Holding(self, Frozen(run.model, live.views, self._global)))
        self.kept = Payload(copies({n: self._local(n, t) for n, t in live.views.items()}))
        live.copy_(trained)
        return joined({"global": shared, "local": own}, shared.loss)

    def shared_state(self) -> Payload:
        return Payload({n: self._global(n, t) for n, t in self.model.adapter.views.items()})

    def deployed(self, client: str | None = None) -> base.Deployed:
        if client is not None:
            return super().deployed(client)
        adapter = self.model.initial_adapter()
        for name, tensor in self.shared.views.items():
            self._global(name, adapter.views[name]).copy_(tensor)
        return base.Deployed(adapter)


def doubled(adapter: AdapterConfig) -> AdapterConfig:
    """Double the rank at the same scale s, which is α/r, or α/√r under rsLoRA."""
    factor = 2**0.5 if adapter.rslora else 2
    return adapter.model_copy(update={"rank": 2 * adapter.rank, "alpha": factor * adapter.alpha})
