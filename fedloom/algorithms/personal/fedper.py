"""FedPer: the last layers' part of the adapter stays with each client; the rest is averaged.

Arivazhagan et al., "Federated Learning with Personalization Layers", arXiv 1912.00818. A client trains both parts
together. Only the shared part θ_B travels and is averaged; the private part θ_P(k) never leaves client k. Every client is
evaluated with θ_B and its own θ_P. A client that never trained has the initial θ_P.

Options choose the private tensors by layer (the last `private_layers` of the model) or by name (`private`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator

from fedloom.algorithms import base
from fedloom.algorithms.about import About, Sizes
from fedloom.algorithms.averaging import fedavg
from fedloom.algorithms.personal.turns import copies
from fedloom.common.errors import UserError
from fedloom.messages.types import Payload
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.layout import Adapter, check_names
from fedloom.recipe.adapter import METHODS
from fedloom.recipe.recipe import AdapterConfig, ModelConfig, TrainConfig


def private_bytes(sizes: Sizes) -> int:
    """Bytes of the part that stays with a client."""
    pattern = sizes.options.private
    if pattern is not None:
        return sizes.part(lambda name: re.search(pattern, name) is not None)
    chosen = last_layers(sizes.layout.names, sizes.options.private_layers)
    return sizes.part(lambda name: name in chosen)


def shared_bytes(sizes: Sizes) -> int:
    """Bytes of the part that travels."""
    return sizes.adapter - private_bytes(sizes)


class FedPer(fedavg.FedAvg):
    """Attributes:
    private: names of the tensors that stay with the client; set once the model is built.
    """

    properties: ClassVar = base.Properties(linear_sum=True, personal=True, neutral={})
    about: ClassVar = About(
        "personalised",
        "shared layers' part",
        "Arivazhagan et al. 2019, arXiv 1912.00818",
        up=shared_bytes,
        down=shared_bytes,
        server=shared_bytes,
        client=private_bytes,
    )

    class Options(fedavg.FedAvg.Options):
        private_layers: int | float = Field(
            0.25, gt=0, description="number of last layers that stay private, or a fraction below 1.0"
        )
        private: str | None = Field(
            None,
            description="instead: a regular expression; the adapter's tensors whose name it matches are private",
        )

        @field_validator("private_layers")
        @classmethod
        def _number_or_fraction(cls, value: int | float) -> int | float:
            if isinstance(value, float) and value >= 1:
                raise ValueError(f"{value:g} is neither a whole number nor a fraction below 1")
            return value

        @field_validator("private")
        @classmethod
        def _compiles(cls, value: str | None) -> str | None:
            try:
                re.compile(value or "")
            except re.error as error:
                raise ValueError(f"it is not a regular expression ({error})") from None
            return value

    options: Options

    @classmethod
    def check(cls, options: Any, adapter: AdapterConfig, train: TrainConfig, model: ModelConfig) -> None:
        if options.private is None and "virtual_tokens" in METHODS[adapter.method].keys:
            raise UserError(
                f"adapter.method={adapter.method} has no tensors in the layers, so the last ones cannot stay private: name "
                "the private tensors with algorithm.private, or set another adapter.method, such as lora"
            )

    def server_model(self, models: Models) -> AdaptedModel:
        model = super().server_model(models)
        self.shared = self._shared_part(model)
        return model

    def client_model(self, models: Models, payload: Payload) -> AdaptedModel:
        model = super().client_model(models, payload)
        self.shared = self._shared_part(model)
        return model

    def _shared_part(self, model: AdaptedModel) -> Adapter:
        """Return the tensors that travel, at their initial values; sets `private`."""
        initial = model.initial_adapter()
        if self.options.private is not None:
            pattern = re.compile(self.options.private)
            self.private = frozenset(n for n in initial.views if pattern.search(n))
        else:
            self.private = last_layers(initial.views, self.options.private_layers)
        if not 0 < len(self.private) < len(initial.views):
            raise UserError(
                f"{len(self.private)} of the adapter's {len(initial.views)} tensors would stay private: choose some of "
                "them, not all, with algorithm.private_layers or algorithm.private (such as 'layers.1.')"
            )
        return Adapter.of({n: t for n, t in initial.tensors().items() if n not in self.private})

    def receive(self, payload: Payload) -> None:
        check_names(self.shared.layout, payload.tensors)
        own = self.kept.tensors or self._as_made()
        self.model.adapter.load({**payload.tensors, **own})

    def shared_state(self) -> Payload:
        live = self.model.adapter.tensors()
        self.kept = Payload(copies({n: t for n, t in live.items() if n in self.private}))
        return Payload({n: t for n, t in live.items() if n not in self.private})

    def deployed(self, client: str | None = None) -> base.Deployed:
        if client is not None:
            return super().deployed(client)
        return base.Deployed(Adapter.of({**self.shared.tensors(), **self._as_made()}))

    def _as_made(self) -> dict[str, torch.Tensor]:
        return {n: t for n, t in self.model.initial_adapter().tensors().items() if n in self.private}


def last_layers(names: Iterable[str], wanted: int | float) -> frozenset[str]:
    """Return those of `names` that are in the last `wanted` layers (a fraction: of all layers; at least one).

    A layer is the first number between dots in a name. A prompt's encoder, whose parts are numbered too, is in no layer.
    Raises UserError if no name has a layer.
    """
    inside = (n for n in names if not n.startswith("prompt_encoder."))
    layer_of = {n: int(found.group(1)) for n in inside if (found := re.search(r"\.(\d+)\.", n))}
    layers = sorted(set(layer_of.values()))
    if not layers:
        raise UserError(
            "this adapter's tensors belong to no layer, so its last layers cannot stay private: name the private "
            "tensors with algorithm.private"
        )
    count = max(1, round(wanted * len(layers))) if isinstance(wanted, float) else wanted
    chosen = set(layers[-count:])
    return frozenset(n for n, layer in layer_of.items() if layer in chosen)
