"""FedOT: clients tune a model's outer layers around an emulator of its middle; the server plugs them into the full model.

FS-LLM (Kuang et al., arXiv 2309.00363) with offsite-tuning (Xiao et al., arXiv 2302.04870):

    server    cut the model into bottom layers A₁, middle M, top layers A₂; build an emulator E of M, smaller and lossy
    broadcast A₁, E, A₂, embeddings, norm and head; once. Layers that were dropped never leave the server
    client    train A₁, A₂ (or LoRA on them) in A₁ ∘ E ∘ A₂, with E and the rest frozen; send A₁, A₂
    server    average them (fedavg), and plug them into A₁ ∘ M ∘ A₂: the *plug-in*, which is evaluated and saved

The emulator is the middle with layers left out (`drop_layers`), in few bits (`quantize`) or as low-rank factors
(`low_rank`). With `align` it is first distilled on public data (models/emulator/distillation.py). Every tensor keeps its
name in the full model (models/emulator/cut.py), so the plug-in loads tensors by name. A client builds its model from the
message alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.offsite import fedavg_outer
from fedloom.algorithms.offsite.alignment import Aligner, AlignOptions
from fedloom.common.errors import ClientFailed, UserError
from fedloom.messages.names import prefixed
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models, attach
from fedloom.models.emulator import shipping
from fedloom.models.emulator.compression import Compression, Factored, Plain, make_compression
from fedloom.models.emulator.cut import Cut, cut_model
from fedloom.recipe.recipe import AdapterConfig

EMULATOR, FROZEN, FILE, LATENT = "emulator/", "frozen/", "file/", "latent/"


#: The share of the middle's layers that `drop_layers` leaves out by default.
DROP = 0.2


class FedOT(fedavg_outer.FedAvgOuter):
    """Attributes:
    compression: how the middle travels.
    version: server half: how often the emulator was aligned; client half: the version of the emulator in the live model.
    latents: server half: the aligned middle; None if it is the model's own.
    aligned: (loss of the first step, of the last step) in the newest alignment.
    """

    properties: ClassVar = base.Properties(
        linear_sum=True,
        methods=frozenset({"full", "lora"}),
        neutral={"mu": 0.0, "drop": 0.0},
        offsite=True,
        weights=True,
        cohorts=False,
    )
    about: ClassVar = About(
        "offsite",
        "outer layers, both ways",
        "Kuang et al. 2023, arXiv 2309.00363",
        up=lambda s: s.outer,
        down=lambda s: s.outer,
        server=lambda s: s.outer + (s.emulator if s.options.align else 0),
    )

    class Options(fedavg_outer.FedAvgOuter.Options):
        emulator: Literal["drop_layers", "quantize", "low_rank"] = Field(
            "drop_layers",
            description="what replaces the middle: fewer layers, weights in few bits, or low-rank factors",
        )
        drop: float | None = Field(
            None,
            ge=0,
            lt=1,
            description="share of the middle's layers left out, under any emulator; 0 leaves the middle untouched; "
            f"null: {DROP} under drop_layers, 0 under the others",
        )
        bits: Literal[4, 8] = Field(8, description="quantize: bits of a weight")
        keep_rank: float = Field(0.25, gt=0, le=1, description="low_rank: share of each weight's rank that is kept")
        align: AlignOptions | None = Field(
            None, description="distil the emulator on public data before round 1: {corpus:} or {path:}, steps, lr …"
        )
        reference: bool = Field(
            True,
            description="also tune the same layers of the full model, in RUN/reference, to compare the plug-in with",
        )

        @property
        def dropped(self) -> float:
            """`drop`, or its default under this emulator."""
            return self.drop if self.drop is not None else DROP if self.emulator == "drop_layers" else 0.0

    options: Options

    def __init__(self, options: base.AlgorithmOptions, seed: int, adapter: AdapterConfig) -> None:
        super().__init__(options, seed, adapter)
        self.compression: Compression
        self.version = 0
        self.latents: dict[str, torch.Tensor] | None = None
        self.aligned: tuple[float, float] | None = None
        self._aligner: Aligner | None = None
        self._wire: dict[str, torch.Tensor] | None = None
        self._files: dict[str, torch.Tensor] | None = None
        self._held: dict[str, int] = {}  # client → the emulator that it was sent

    # ------------------------------------------------------------------ server: the model is cut

    def server_model(self, models: Models) -> AdaptedModel:
        self._check_options()
        shipping.check_shippable(models.base().model)
        model = super().server_model(models)
        self.compression = self._compression(model.causal_lm.dtype)
        self._shapes = {n: t.shape for n, t in self._middle().items()}
        if isinstance(self.compression, Factored):
            self.compression.check(self._shapes)
        if self.options.align is not None and not self.untouched:
            self._aligner = Aligner(self.options.align, model, self.seed)
        return model

    @property
    def untouched(self) -> bool:
        """Whether the emulator is the middle itself, so that there is nothing to align."""
        return isinstance(self.compression, Plain) and not self.cut.dropped

    def _cut(self, models: Models) -> Cut:
        self._check_some_layers()
        return cut_model(models.base().model, self.options.bottom, self.options.top, self.options.dropped)

    def _check_options(self) -> None:
        given = self.options.model_fields_set
        for key, owner in (("bits", "quantize"), ("keep_rank", "low_rank")):
            if key in given and self.options.emulator != owner:
                raise UserError(
                    f"algorithm.{key} belongs to algorithm.emulator={owner}, not to {self.options.emulator}: leave it out"
                )

    def _compression(self, dtype: torch.dtype) -> Compression:
        return make_compression(self.options.emulator, dtype, self.options.bits, self.options.keep_rank)

    def _middle(self) -> dict[str, torch.Tensor]:
        """Return the live weights of the emulator's layers in the full model, by name."""
        inside = self.cut.prefixes(self.cut.kept)
        weights = self.model.base_weights()
        return {n: weights[n] for n in self.model.frozen_tensors() if n.startswith(inside) and n in weights}

    def _rest(self) -> dict[str, torch.Tensor]:
        """Return the other frozen tensors a client needs: embeddings, norm, head; under LoRA the outer layers too."""
        inside = self.cut.prefixes(self.cut.dropped)
        frozen = self.model.frozen_tensors()
        return {n: t.detach() for n, t in frozen.items() if n not in self._shapes and not n.startswith(inside)}

    # ------------------------------------------------------------------ server: the emulator

    def _emulator(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the middle that travel."""
        self._distil_once()
        if self._wire is None:
            latents = self.latents
            if latents is None:
                own = self._middle()
                latents = own if isinstance(self.compression, Plain) else self.compression.latents(own)
            self._wire = self.compression.encode(latents)
        return self._wire

    def _distil_once(self) -> None:
        """Align before the first message or checkpoint. A resumed run has the result in its state."""
        if self._aligner is not None and self.latents is None:
            self.latents = self.compression.latents(self._middle())
            self._align()

    def _align(self) -> None:
        """Train the emulator against the full model, which has the shared adapter."""
        if self._aligner is None:
            return
        assert self.latents is not None
        self.model.adapter.copy_(self.shared.flat)
        self.version += 1
        self.aligned = self._aligner.align(self.model, self.cut, self.compression, self.latents, self.version)
        self._wire = None

    def initial_payload(self, client: str) -> Payload:
        emulator = self._emulator()
        self._held[client] = self.version
        if self._files is None:
            self._files = shipping.encode_files(self.model.causal_lm, self.model.tokenizer)
        tensors = {
            **self.shared.tensors(),
            **prefixed(emulator, EMULATOR),
            **{FROZEN + n: t for n, t in self._rest().items()},
            **{FILE + n: t for n, t in self._files.items()},
        }
        cut = {"path": self.cut.path, "total": self.cut.total, "kept": list(self.cut.kept)}
        dtype = str(self.model.causal_lm.dtype).removeprefix("torch.")
        return Payload(tensors, {"emulator": self.version, "cut": cut, "dtype": dtype})

    def round_payload(self, client: str) -> Payload:
        """Return the adapter, and the emulator if alignment changed it since this client received it."""
        emulator = self._emulator() if self._held.get(client) != self.version else {}
        self._held[client] = self.version
        tensors = {**self.shared.tensors(), **prefixed(emulator, EMULATOR)}
        return Payload(tensors, {"emulator": self.version})

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        """Aggregate as FedAvg does, and report the losses of the newest alignment."""
        metrics = super().aggregate(updates)
        if self.aligned is None:
            return metrics
        return {**metrics, "alignment_first": self.aligned[0], "alignment_last": self.aligned[1]}

    def server_state(self) -> Payload:
        self._distil_once()
        latents = prefixed(self.latents or {}, LATENT)
        aligned = list(self.aligned) if self.aligned else None
        return Payload({**super().server_state().tensors, **latents}, {"version": self.version, "aligned": aligned})

    def load_server_state(self, state: Payload) -> None:
        self.load_shared(state)
        latents = {n: t.clone() for n, t in state.under(LATENT).items()}
        self.latents = {n: t.to(self.model.device) for n, t in latents.items()} or None
        self.version = int(state.meta["version"])
        aligned = state.meta["aligned"]
        self.aligned = (aligned[0], aligned[1]) if aligned else None
        self._wire = None
        self._held = {}

    def left_server(self) -> Mapping[str, int]:
        wire, rest = self._emulator(), self._rest()
        weights = [p for n, p in self.model.base_weights().items() if n in self._names_of_the_base()]
        outer = self.shared.tensors() if self.model.full else {}
        given = [*rest.values(), *outer.values()]
        return {
            "parameters": self.compression.count_numbers(wire, self._shapes) + sum(t.numel() for t in given),
            "parameters_of_model": sum(p.numel() for p in weights),
            "bytes": sum(t.nbytes for t in (*wire.values(), *given)),
            "bytes_of_model": sum(p.nbytes for p in weights),
        }

    def _names_of_the_base(self) -> set[str]:
        """Return the names of the full model's own weights, without LoRA's."""
        return {n for n, p in self.model.base_weights().items() if self.model.full or not p.requires_grad}

    def compared_with(self) -> Mapping[str, Any] | None:
        if not self.options.reference:
            return None
        same = {key: getattr(self.options, key) for key in fedavg_outer.FedAvgOuter.Options.model_fields}
        return {"name": "fedavg_outer", **same}

    # ------------------------------------------------------------------ client: the model is built from the message

    def client_model(self, models: Models, payload: Payload) -> AdaptedModel:
        cut = payload.meta["cut"]
        self.cut = Cut(cut["path"], cut["total"], self.options.bottom, self.options.top, tuple(cut["kept"]))
        dtype = getattr(torch, payload.meta["dtype"])
        files = payload.under(FILE)
        empty = shipping.build_skeleton(files, self.cut, dtype)
        inside = self.cut.prefixes(self.cut.kept)
        self._shapes = {n: p.shape for n, p in empty.named_parameters() if n.startswith(inside)}
        self.compression = self._compression(dtype)
        middle = self.compression.decode(payload.under(EMULATOR), self._shapes)
        outer = _adapter(payload) if self.adapter.method == "full" else {}
        base_model = shipping.fill_skeleton(empty, {**payload.under(FROZEN), **middle, **outer}, files, models.device)
        self.model = attach(base_model, self.adapter, self.seed, self.cut.prefixes(self.cut.outer))
        self.version = int(payload.meta["emulator"])
        return self.model

    def receive(self, payload: Payload) -> None:
        super().receive(Payload(_adapter(payload)))
        sent = int(payload.meta["emulator"])
        if sent == self.version:
            return
        wire = payload.under(EMULATOR)
        if not wire:
            raise ClientFailed("stale_emulator", f"the server is at emulator {sent} and this client at {self.version}")
        weights = self.model.base_weights()
        with torch.no_grad():
            for name, weight in self.compression.decode(wire, self._shapes).items():
                weights[name].copy_(weight)
        self.version = sent


def _adapter(payload: Payload) -> dict[str, torch.Tensor]:
    """Return the trained tensors, under their names in the full model."""
    return payload.without(EMULATOR, FROZEN, FILE)
