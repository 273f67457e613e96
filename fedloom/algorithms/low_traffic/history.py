"""A run as the list of its rounds' coefficients: a client keeps those it received, and is sent the later ones.

For algorithms whose rounds change the weights along directions that everybody can draw (directions.py): round r adds
−Σ_i a_ri z_ri. The server keeps the numbers of every round. A client keeps those that it received, as its own state, so a
message has only the rounds that the client missed. This file does not know how the numbers are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from fedloom.algorithms import base
from fedloom.algorithms.about import NUMBER
from fedloom.algorithms.low_traffic.directions import Direction, Directions, Replay, check_coefficients
from fedloom.common.errors import ClientFailed
from fedloom.messages.names import prefixed
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models

#: In the server's state, before a client's name: how many rounds it holds.
CLIENT = "client/"


def listed(scalars: int, rounds: int) -> int:
    """Bytes of `rounds` rounds as `History.since` returns them, with `scalars` bytes of coefficients in each."""
    return NUMBER + rounds * (NUMBER + scalars)


class History:
    """The coefficients of all rounds: `rounds[r − 1]` has those of round r, float32."""

    def __init__(self) -> None:
        self.rounds: list[torch.Tensor] = []

    def since(self, held: int) -> dict[str, torch.Tensor]:
        """Return the rounds after the first `held`, as tensors."""
        later = self.rounds[held:]
        return {
            "held": torch.tensor(held, dtype=torch.int32),
            "counts": torch.tensor([len(r) for r in later], dtype=torch.int32),
            "scalars": torch.cat(later) if later else torch.zeros(0),
        }

    def extend(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add the rounds of a `since` that are not here yet. Raises ValueError if rounds in between are missing."""
        held = int(tensors["held"])
        if held > len(self.rounds):
            raise ValueError(f"rounds {len(self.rounds) + 1} to {held} are missing")
        check_coefficients(tensors["scalars"])
        if int(tensors["counts"].sum()) != len(tensors["scalars"]):
            raise ValueError(f"{len(tensors['scalars'])} scalars for rounds of {tensors['counts'].tolist()}")
        later = list(torch.split(tensors["scalars"].clone(), tensors["counts"].tolist()))
        self.rounds += later[len(self.rounds) - held :]

    def coefficients(self, directions: Callable[[int, int], list[Direction]]) -> dict[Direction, float]:
        """Direction → coefficient, over all rounds; `directions`: (round, count) → its directions."""
        return {
            direction: value
            for round, values in enumerate(self.rounds, 1)
            for direction, value in zip(directions(round, len(values)), values.tolist(), strict=True)
        }


class Replayed(base.Algorithm):
    """Both halves of an algorithm that sends rounds' coefficients and replays them.

    A subclass defines the directions of a round and how a client computes its coefficients. `aggregate` appends the
    clients' mean, weighted by their examples. A client with fewer coefficients than others counts 0 for the rest.

    Attributes:
        history: the server's, or the client's own with what it just received.
        held: server half: client → number of rounds that it has; 0 for a client that is not listed.
    """

    def server_model(self, models: Models) -> AdaptedModel:
        model = super().server_model(models)
        self.held: dict[str, int] = {}
        self._prepare(model)
        return model

    def client_model(self, models: Models, payload: Payload) -> AdaptedModel:
        model = super().client_model(models, payload)
        self._prepare(model)
        return model

    def _prepare(self, model: AdaptedModel) -> None:
        self.history = History()
        self.space = Directions(self.seed, model.adapter.layout.numel)
        self._replay = Replay(self.space, model.initial)

    def directions(self, round: int, count: int) -> list[Direction]:
        """Return the `count` directions of a round."""
        return [Direction(round, number) for number in range(count)]

    # ------------------------------------------------------------------ server

    def initial_payload(self, client: str) -> Payload:
        """Return all rounds, because the client may have lost its state."""
        return Payload(self.history.since(0))

    def round_payload(self, client: str) -> Payload:
        return Payload(self.history.since(self.held.get(client, 0)))

    def update_layout(self) -> None:
        return None

    def accept(self, update: Update) -> None:
        super().accept(update)
        if set(update.payload.tensors) != {"scalars"}:
            raise ValueError(f"expected scalars, got {', '.join(sorted(update.payload.tensors)) or 'nothing'}")
        check_coefficients(update.payload.tensors["scalars"])

    def mean(self, updates: Iterator[Update]) -> torch.Tensor:
        """Return Σ p_k a_k, float32, and record how many rounds each of these clients has."""
        total, examples = torch.zeros(0, dtype=torch.float64), 0
        for update in updates:
            sent = update.payload.tensors["scalars"].double()
            size = max(len(total), len(sent))
            total = torch.cat([total, total.new_zeros(size - len(total))])
            total[: len(sent)] += update.num_examples * sent
            examples += update.num_examples
            self.held[update.client] = update.round - 1
        return (total / examples).float()

    def deployed(self, client: str | None = None) -> base.Deployed:
        if client is None:
            self.shared.copy_(self._replay.at(self.history.coefficients(self.directions)))
        return super().deployed(client)

    def server_state(self) -> Payload:
        held = prefixed({c: torch.tensor(n, dtype=torch.int32) for c, n in self.held.items()}, CLIENT)
        return Payload({**self.history.since(0), **held})

    def load_server_state(self, state: Payload) -> None:
        self.history = History()
        self.history.extend(state.tensors)
        self.held = {client: int(rounds) for client, rounds in state.under(CLIENT).items()}

    # ------------------------------------------------------------------ client

    def receive(self, payload: Payload) -> None:
        self.history = History()
        try:
            if self.kept.tensors:
                self.history.extend(self.kept.tensors)
            self.history.extend(payload.tensors)
        except ValueError as error:
            raise ClientFailed(
                "damaged_state", f"this client cannot catch up: {error}. Resume with --resume: it sends all rounds"
            ) from None
        self.model.adapter.copy_(self._replay.at(self.history.coefficients(self.directions)))

    def client_state(self) -> Payload:
        return Payload(self.history.since(0))
