"""FedAvg of a model's first and last layers, on the full model: what offsite tuning is compared with, and its trained part.

The trainable buffer holds the outer layers' weights (`adapter.method: full`), or LoRA on their linear layers (`lora`);
embeddings, final norm and head never train. Everything else is FedAvg, with FedProx's μ where one is given. Clients hold
the full model; `fedot` and `fedbiot` (fedot.py, fedbiot.py) train the same buffer without it.
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
    cut: which layers are the outer ones; there once a model is.
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
        bottom: int = Field(2, ge=0, description="how many of the first layers are tuned")
        top: int = Field(2, ge=0, description="how many of the last layers are tuned")
        mu: float = Field(0.0, ge=0, description="μ: how strongly a client is held near the broadcast, as in fedprox")

    options: Options

    def server_model(self, models: Models) -> AdaptedModel:
        self.model = self._outer(models)
        self.shared = self.model.initial_adapter()
        return self.model

    def client_model(self, models: Models, payload: Payload) -> AdaptedModel:
        self.model = self._outer(models)
        return self.model

    def _outer(self, models: Models) -> AdaptedModel:
        """The full model whose outer layers alone train."""
        self.cut = self._cut(models)
        return models.adapted(within=self.cut.prefixes(self.cut.outer))

    def _cut(self, models: Models) -> Cut:
        self._check_some_layers()
        return cut_model(models.base().model, self.options.bottom, self.options.top, hide=False)

    def _check_some_layers(self) -> None:
        if not self.options.bottom + self.options.top:
            raise UserError("algorithm.bottom=0 and algorithm.top=0 leave no layer to tune: set one of them")
