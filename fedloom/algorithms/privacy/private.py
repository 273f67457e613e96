"""Make an algorithm that is a plain sum private: clip each client's change, add noise, and count the privacy spent.

DP-FedAvg of McMahan et al., "Learning Differentially Private Recurrent Language Models", arXiv 1710.06963, Algorithm 1
with its estimator of fixed denominator. Δ_k is what client k sends minus what it received, over all tensors together, m
the expected number of clients, C the clip (clipping.py) and z the noise multiplier:

    where: server     Δ̄ = (Σ_k clip_C(Δ_k) + N(0, (zC)² I)) / m
    where: client     Δ̄ = Σ_k (clip_C(Δ_k) + N(0, (zC)² I)) / m         each client's noise is added before it sends

The inner algorithm receives one update: what was sent to clients plus Δ̄. A plain sum needs nothing else. So every client
has the same weight, however much data it has: a weight that depends on the data would have to be bounded and hidden too.
A client that failed adds nothing; m and the noise are unchanged.

The wrapper clips on the client and again on the server, which trusts no client: in `server` mode to C, in `client` mode
to a norm that honest noise does not reach. docs/privacy.md says against which parties each mode protects. This file does
not know which algorithm it wraps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from fedloom.algorithms import base
from fedloom.algorithms.privacy import clipping
from fedloom.algorithms.privacy.accounting import Ledger
from fedloom.common.errors import ClientFailed
from fedloom.common.randomness import secret_normal, torch_generator
from fedloom.data.batching import Batch
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.layout import Layout, check_names
from fedloom.recipe.privacy import PrivacyConfig
from fedloom.training.trainer import FitResult, LocalRun

#: Prefix of what travels and is stored next to the algorithm's own tensors.
OWN = "privacy/"


CLIP, WITHIN, LEDGER, JOINT = OWN + "clip", OWN + "within", OWN + "ledger", OWN + "joint"


class Private(base.Algorithm):
    """Attributes:
    inner: the server or client half of the algorithm that is made private.
    clip: C of the next round; on a client the newest C that it received.
    ledger: releases to the party that the mode protects against: everybody who sees the models (server mode), or also
        the server (client mode).
    joint: in client mode, releases to those who see the models only.
    """

    def __init__(self, inner: base.Algorithm, privacy: PrivacyConfig, expected: int) -> None:
        super().__init__(inner.options, inner.seed, inner.adapter)
        # Instances wrap different algorithms, so the properties belong to the instance, not to the class.
        self.properties = replace(inner.properties, linear_sum=False, exact=False, neutral=None)  # type: ignore[misc]
        self.inner = inner
        self.privacy = privacy
        self.expected = expected
        self.noise = privacy.noise or 0.0
        self.deviations = clipping.deviations(privacy, expected)
        self.clip = privacy.clip
        self.finished = 0
        self.ledger, self.joint = Ledger(), Ledger()

    @property
    def _at_clients(self) -> bool:
        return self.privacy.where == "client"

    @property
    def _delta(self) -> float:
        assert self.privacy.delta is not None, "call plan.settle_privacy before the first round"
        return self.privacy.delta

    @property
    def rate(self) -> float:
        """q for the accountant: the probability of being sampled; 1 in client mode, where the server sees the sample."""
        assert self.privacy.population is not None, "call plan.settle_privacy before the first round"
        return 1.0 if self._at_clients else min(1.0, self.expected / self.privacy.population)

    def _noise(self, count: int, round: int, client: str) -> tuple[torch.Tensor, float]:
        """Draw noise for a clipped sum, [count] float64, and for the number of clients within the clip."""
        if self.privacy.seeded:
            generator = torch_generator(self.seed, "noise", round, client)
            normal = torch.randn(count + 1, generator=generator, dtype=torch.float64)
        else:
            normal = secret_normal(count + 1)
        return self.deviations.vector * self.clip * normal[:-1], (self.deviations.count or 0.0) * float(normal[-1])

    # ------------------------------------------------------------------ models, and what goes down

    def server_model(self, models: Models) -> AdaptedModel:
        self.model = self.inner.server_model(models)
        self.shared = self.inner.shared
        return self.model

    def client_model(self, models: Models, payload: Payload) -> AdaptedModel:
        self.model = self.inner.client_model(models, _without_own(payload))
        return self.model

    @property
    def own_initial(self) -> bool:
        return self.inner.own_initial

    def initial_payload(self, client: str) -> Payload:
        return self._with_clip(self.inner.initial_payload(client))

    def round_payload(self, client: str) -> Payload:
        return self._with_clip(self.inner.round_payload(client))

    def _with_clip(self, payload: Payload) -> Payload:
        return Payload({**payload.tensors, CLIP: torch.tensor(self.clip, dtype=torch.float64)}, payload.meta)

    # ------------------------------------------------------------------ server

    def _layout(self) -> Layout:
        """Return the layout of a round's change."""
        layout = self.inner.update_layout()
        assert layout is not None, "a plain sum has updates of one shape"
        return layout

    def update_layout(self) -> Layout:
        own = {} if self.deviations.count is None else {WITHIN: ()}
        return Layout({**self._layout().shapes, **own})

    def accept(self, update: Update) -> None:
        check_names(self.update_layout(), update.payload.tensors)
        super().accept(update)
        self.inner.accept(replace(update, payload=_without_own(update.payload)))

    def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
        layout = self._layout()
        total = torch.zeros(layout.numel, dtype=torch.float64)
        deviation = self.deviations.vector * self.clip
        bound = clipping.largest_honest(self.clip, deviation, layout.numel) if self._at_clients else self.clip
        received, bits, norms = 0, 0.0, []
        for update in updates:
            flat = flattened(layout, _without_own(update.payload).tensors)
            if self.noise == 0:
                norms.append(clipping.norm_of(flat))
            total += clipping.clipped(flat, bound)
            bits += self._bit(update.payload)
            received += 1
        number = self.finished + 1
        if not self._at_clients:  # always, however many clients sent an update
            noise, count_noise = self._noise(layout.numel, number, "")
            total, bits = total + noise, bits + count_noise
        metrics = {**self._stepped(layout, total / self.expected, number), "clip": self.clip}
        if norms:  # without noise there is no guarantee, so norms may be logged
            metrics |= {"median_norm": statistics.median(norms)}
        self.finished = number
        self._count(received)
        if self.privacy.adaptive is not None:
            metrics["within_clip"] = within = 0.5 + bits / self.expected
            self.clip = clipping.moved(self.clip, self.privacy.adaptive, within)
        return metrics | self._spent()

    def _bit(self, payload: Payload) -> float:
        """Return b_k − ½, with the client's noise in client mode, bounded so that no client has more than one vote."""
        if self.deviations.count is None:
            return 0.0
        most = clipping.largest_honest(0.5, self.deviations.count, 1) if self._at_clients else 0.5
        return max(-most, min(most, float(payload.tensors[WITHIN])))

    def _stepped(self, layout: Layout, mean: torch.Tensor, number: int) -> dict[str, float]:
        """Run the algorithm's own aggregation on what was sent plus `mean`."""
        sent = self.inner.round_payload("").tensors
        tensors = {n: (sent[n].detach().cpu().double() + v).to(sent[n].dtype) for n, v in layout.views(mean).items()}
        return dict(self.inner.aggregate(iter([Update("all clients", number, Payload(tensors), 1, 1)])))

    def _count(self, received: int) -> None:
        """Add one round to the ledgers."""
        if self._at_clients:
            # Against the server: with other data, a client's clipped change differs by at most 2C. Against all others: the
            # sum has the noise of every client whose message arrived, and one client's change is at most C.
            self.ledger.add(self.noise / 2)
            self.joint.add(self.noise * math.sqrt(received), count=min(1, received))
        else:
            self.ledger.add(self.noise, self.rate)

    def _spent(self) -> dict[str, float]:
        if self.noise == 0:
            return {}
        known = {"epsilon": self.ledger.epsilon(self._delta), "delta": self._delta}
        return known | ({"epsilon_models": self.joint.epsilon(self._delta)} if self._at_clients else {})

    def repeated(self, rounds: int) -> bool:
        """Count the releases of repeated rounds again, unless the noise is seeded and so the same."""
        if self.privacy.seeded:
            return False
        if self._at_clients:
            self.ledger.add(self.noise / 2, count=rounds + 1)  # clients may have sent in the interrupted round
            self.joint.add(self.noise, count=rounds)  # the number of senders is unknown; at least this client
            return True
        self.ledger.add(self.noise, self.rate, rounds)
        return rounds > 0

    def guarantee(self) -> Mapping[str, Any]:
        return {
            **{"epsilon": None, "epsilon_models": None, "delta": self._delta, **self._spent()},
            "where": self.privacy.where,
            "noise": self.noise,
            "clip": self.clip,
            "adaptive": self.privacy.adaptive is not None,
            "expected_clients": self.expected,
            "population": self.privacy.population,
            "sampling_rate": self.rate,
            "releases": self.ledger.releases,
            "seeded": self.privacy.seeded,
        }

    def server_step(self) -> None:
        self.inner.server_step()

    def server_state(self) -> Payload:
        state = self.inner.server_state()
        own = {
            CLIP: torch.tensor(self.clip, dtype=torch.float64),
            LEDGER: self.ledger.tensor(),
            JOINT: self.joint.tensor(),
        }
        return Payload({**state.tensors, **own}, {**state.meta, "private_rounds": self.finished})

    def load_server_state(self, state: Payload) -> None:
        self.clip = float(state.tensors[CLIP])
        self.ledger, self.joint = Ledger.of(state.tensors[LEDGER]), Ledger.of(state.tensors[JOINT])
        self.finished = int(state.meta["private_rounds"])
        meta = {k: v for k, v in state.meta.items() if k != "private_rounds"}
        self.inner.load_server_state(Payload(_without_own(state).tensors, meta))

    # ------------------------------------------------------------------ client

    def begin(self, client: str, round: int, kept: Payload | None) -> None:
        super().begin(client, round, kept)
        self.inner.evaluating = self.evaluating
        self.inner.begin(client, round, kept)

    def receive(self, payload: Payload) -> None:
        clip = payload.tensors.get(CLIP)
        if clip is None or not (0 < float(clip) < math.inf):
            raise ClientFailed("bad_payload", "the server's message has no clip, which says how much noise is needed")
        self.clip = float(clip)
        own = _without_own(payload)
        self._received = {} if self.evaluating else {n: t.detach().cpu().clone() for n, t in own.tensors.items()}
        self.inner.receive(own)

    def shared_state(self) -> Payload:
        """Return the clipped change, in client mode with this client's noise, and the bit if the clip adapts."""
        sent = self.inner.shared_state()
        foreign = [n for n, t in sent.tensors.items() if n not in self._received or t.shape != self._received[n].shape]
        if foreign or sent.meta:
            what = foreign[0] if foreign else "metadata"
            raise ValueError(
                f"{what} would leave the client unclipped: shared_state must send only tensors that the "
                "client received, and no metadata"
            )
        layout = Layout({n: t.shape for n, t in sent.tensors.items()})
        change = flattened(layout, sent.tensors) - flattened(layout, {n: self._received[n] for n in layout.names})
        if not bool(torch.isfinite(change).all()):
            raise ClientFailed("non_finite", "this client's update is not finite: lower train.lr")
        bit = 0.5 if clipping.norm_of(change) <= self.clip else -0.5
        change = clipping.clipped(change, self.clip)
        if self._at_clients:
            noise, count_noise = self._noise(layout.numel, self.round, self.client)
            change, bit = change + noise, bit + count_noise
        tensors = {n: v.float() for n, v in layout.views(change).items()}
        if self.deviations.count is not None:
            tensors[WITHIN] = torch.tensor(bit)
        return Payload(tensors)

    def local_training(self, run: LocalRun) -> FitResult:
        return self.inner.local_training(run)

    def local_loss(self, model: AdaptedModel, batch: Batch, step_tokens: int) -> torch.Tensor:
        return self.inner.local_loss(model, batch, step_tokens)

    def before_step(self, model: AdaptedModel) -> None:
        self.inner.before_step(model)

    def after_step(self, model: AdaptedModel) -> None:
        self.inner.after_step(model)

    def deployed(self, client: str | None = None) -> base.Deployed:
        return self.inner.deployed(client)

    def left_server(self) -> Mapping[str, int] | None:
        return self.inner.left_server()

    def compared_with(self) -> Mapping[str, Any] | None:
        return self.inner.compared_with()

    def client_state(self) -> Payload:
        return self.inner.client_state()


def flattened(layout: Layout, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return all tensors as one vector: [numel] float64, in name order."""
    return torch.cat([tensors[n].detach().to("cpu", torch.float64).reshape(-1) for n in layout.names])


def _without_own(payload: Payload) -> Payload:
    return Payload({n: t for n, t in payload.tensors.items() if not n.startswith(OWN)}, payload.meta)
