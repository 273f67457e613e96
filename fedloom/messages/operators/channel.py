"""Both ends of the connection: choose a payload's chain, store what it needs, and turn errors into failures.

    server  encode ──── initial or down ────▶ decode  client
            decode ◀───────── up ──────────── encode

`initial` is for the first payload that a client gets in a run, `down` for all later ones, evaluation's too, `up` for
the
updates. Between rounds a side stores nothing but the client's residual of error feedback. So error feedback and `delta`
belong to `up`: on the way down the server would have to store a copy for each client. This file does not know runtimes:
it returns payloads like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedloom.common.errors import ClientFailed, RunFailed, UserError
from fedloom.common.randomness import torch_generator
from fedloom.messages.operators.base import CannotEncode
from fedloom.messages.operators.chain import Chain, Residual
from fedloom.messages.operators.flat import BadPayload, bits
from fedloom.messages.types import Assignment, Failure, Outcome, Payload, Update
from fedloom.recipe.recipe import OperatorsConfig

#: Broadcasts stored per client with `delta`, so that a late update can still be decoded.
STORED_BROADCASTS = 4


@dataclass(frozen=True)
class Chains:
    """A recipe's three chains: of first payloads, of updates, and of all later payloads to clients."""

    initial: Chain
    up: Chain
    down: Chain

    def __bool__(self) -> bool:
        """Whether there is any operator."""
        return bool(self.initial.operators or self.up.operators or self.down.operators)

    @classmethod
    def of(cls, config: OperatorsConfig, differences: bool = False) -> Chains:
        """Build the chains. Raises UserError for unknown names and options, and for invalid chains.

        Args:
            config: the recipe's section `operators`.
            differences: whether updates are already differences from the broadcast, as under privacy.
        """
        chains = {
            n: Chain.parse([o.model_dump() for o in getattr(config, n)], f"operators.{n}")
            for n in ("initial", "up", "down")
        }
        for name in ("initial", "down"):
            chain = chains[name]
            if chain.needs_reference:
                raise UserError(
                    f"operators.{name} has delta, which needs an earlier broadcast: it belongs to operators.up"
                )
            if chain.error_feedback:
                raise UserError(
                    f"operators.{name} has error_feedback, for which the server would store a copy per client: "
                    "it belongs to operators.up"
                )
        if differences and chains["up"].needs_reference:
            raise UserError("operators.up has delta, but under privacy updates are already differences: leave it out")
        for name, chain in chains.items():
            zeroing = [d["name"] for o, d in zip(chain.operators, chain.described, strict=True) if o.for_differences]
            if zeroing and not chain.needs_reference and not (differences and name == "up"):
                fix = "put delta before it" if name == "up" else "it belongs to operators.up, after delta"
                raise UserError(f"operators.{name} has {zeroing[0]}, which would zero most of the weights: {fix}")
        return cls(**chains)


class ServerChannel:
    """The server's end. A run whose chains are all empty has no channel: its payloads travel as they are."""

    def __init__(self, chains: Chains, seed: int) -> None:
        self.chains = chains
        self.seed = seed
        self._met: set[str] = set()
        self._references: dict[str, dict[int, dict[str, torch.Tensor]]] = {}  # client → round → what it got
        self._last: dict[str, torch.Tensor] | None = None

    def encode(self, assignment: Assignment, own_initial: bool) -> Assignment:
        """Return the assignment with its payload encoded.

        Args:
            assignment: with a plain payload.
            own_initial: whether the payload is an initial one unlike those of rounds (an emulator), sent again after a
                restart.
        """
        client, first = assignment.client, own_initial or assignment.client not in self._met
        chain = self.chains.initial if first else self.chains.down
        self._met.add(client)
        try:  # one generator for all clients: equal payloads stay equal, and are stored once
            coded = chain.encode(assignment.payload, torch_generator(self.seed, "quantise", assignment.round))
        except CannotEncode as error:
            raise RunFailed(f"round {assignment.round} cannot be sent: {error}; finished rounds are kept") from error
        if self.chains.up.needs_reference and assignment.kind == "train":
            held = self._references.setdefault(client, {})
            held[assignment.round] = self._copy_broadcast(
                (assignment.payload if chain.lossless else chain.decode(coded)).tensors
            )
            for old in sorted(held)[:-STORED_BROADCASTS]:
                del held[old]
        return replace(assignment, payload=coded)

    def decode(self, outcome: Outcome) -> Outcome:
        """Return a training outcome with its payload decoded, or a `Failure` that says what is wrong with it.

        Called on each outcome as it comes from the runtime, so that later stages store only plain ones.
        """
        if not isinstance(outcome, Update):
            return outcome
        try:
            reference = self._references.get(outcome.client, {}).pop(outcome.round, None)
            return replace(outcome, payload=self.chains.up.decode(outcome.payload, reference))
        except BadPayload as error:
            return Failure(outcome.client, outcome.round, "bad_payload", str(error), outcome.cost)

    def notes(self) -> dict[str, Any]:
        """Return what a checkpoint stores: which clients got a first payload, if that differs from later ones."""
        differ = self.chains.initial.described != self.chains.down.described
        return {"met": sorted(self._met)} if differ else {}

    def load_notes(self, notes: Mapping[str, Any]) -> None:
        self._met = set(notes.get("met", ()))

    def _copy_broadcast(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a copy that later rounds do not change; the last copy if it is equal."""
        last = self._last
        if last is None or set(last) != set(tensors) or not all(_equal_bits(last[n], t) for n, t in tensors.items()):
            last = {n: t.detach().cpu().clone() for n, t in tensors.items()}
            self._last = last
        return last


class ClientChannel:
    """A client's end: decodes assignments, encodes updates.

    In a simulation it serves all clients, one after another.
    """

    def __init__(self, chains: Chains, seed: int) -> None:
        self.chains = chains
        self.seed = seed
        self._reference: dict[str, torch.Tensor] | None = None
        self._residual: Residual = {}

    def decode(self, assignment: Assignment) -> Payload:
        """Return an assignment's plain payload. Raises ClientFailed. Has to be called first for each assignment."""
        self._residual, self._reference = {}, None
        operators = None if assignment.payload.coding is None else assignment.payload.coding.get("operators")
        chains = (self.chains.initial, self.chains.down)
        chain = next((c for c in chains if (c.described or None) == operators), self.chains.down)
        try:
            payload = chain.decode(assignment.payload)
        except BadPayload as error:
            raise ClientFailed("bad_payload", str(error)) from error
        if self.chains.up.needs_reference and assignment.kind == "train":
            self._reference = {n: t.detach().cpu().clone() for n, t in payload.tensors.items()}
        return payload

    def resume(self, state: Payload | None) -> None:
        """Restore what `state` returned."""
        self._residual = dict(state.tensors) if state is not None else {}

    def encode(self, payload: Payload, client: str, round: int) -> Payload:
        """Return the encoded payload. Raises ClientFailed."""
        generator = torch_generator(self.seed, "quantise", round, client)
        try:
            return self.chains.up.encode(payload, generator, self._reference, self._residual)
        except CannotEncode as error:
            raise ClientFailed("non_finite", str(error)) from error

    def state(self) -> Payload:
        """Return the residual of error feedback, to be stored with the client's own state."""
        return Payload(dict(self._residual))


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors are equal in every bit: a NaN equals itself, and -0 differs from 0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
