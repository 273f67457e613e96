"""FedAvg of a model's first and last layers, with the full model on clients: the reference for offsite tuning.

The trainable buffer has the outer layers' weights (`adapter.method: full`), or LoRA on their linear layers (`lora`).
Embeddings, final norm and head never train. The rest is FedAvg, with FedProx's penalty if `mu` is not 0. Clients have the
full model; `fedot` and `fedbiot` (fedot.py, fedbiot.py) train the same buffer without it.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.averaging import fedprox
from fedloom.common.errors import UserError
from fedloom.messages.types import Payload
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.emulator.cut import Cut, cut_model


class FedAvgOuter(fedprox.FedProx):
    """Attributes:
    cut: which layers are the outer ones; set once the model is built.
    """

    properties: ClassVar = base.Properties(linear_sum=True, methods=frozenset({"full", "lora"}), neutral={"mu": 0.0})
    about: ClassVar = About(
        "baseline",
        "outer layers, both ways",
        up=lambda s: s.outer,
        down=lambda s: s.outer,
        server=lambda s: s.outer,
    )

    class Options(fedprox.FedProx.Options):
        bottom: int = Field(2, ge=0, description="number of first layers to tune")
        top: int = Field(2, ge=0, description="number of last layers to tune")
        mu: float = Field(0.0, ge=0, description="μ: how strongly a client stays near the broadcast, as in fedprox")

    options: Options

    def server_model(self, models: Models) -> AdaptedModel:
        self.model = self._outer(models)
        self.shared = self.model.initial_adapter()
        return self.model

    def client_model(self, models: Models, payload: Payload) -> AdaptedModel:
        self.model = self._outer(models)
        return self.model

    def _outer(self, models: Models) -> AdaptedModel:
        """Build the full model; only its outer layers train."""
        self.cut = self._cut(models)
        return models.adapted(within=self.cut.prefixes(self.cut.outer))

    def _cut(self, models: Models) -> Cut:
        self._check_some_layers()
        return cut_model(models.base().model, self.options.bottom, self.options.top, hide=False)

    def _check_some_layers(self) -> None:
        if not self.options.bottom + self.options.top:
            raise UserError("algorithm.bottom=0 and algorithm.top=0 leave no layer to tune: set one of them")
