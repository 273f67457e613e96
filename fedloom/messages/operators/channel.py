"""Both ends of the way: which chain a payload goes through, what each side holds for it, and what becomes a failure.

    server  sent ───── initial or down ────▶ received  client
            opened ◀──────── up ──────────── encoded

`initial` is for the first payload that a client gets in a run, `down` for all later ones, evaluation's too, `up` for the
updates. Nothing but the client's own residual of error feedback has to be remembered by either side from round to round; so
error feedback and `delta` belong to `up`: on the way down the server would have to hold a copy for each client.
This file does not know runtimes: what it makes is a payload like any other.
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

#: Broadcasts of a client that are held for an update that is late, where `delta` is in use.
HELD = 4


@dataclass(frozen=True)
class Chains:
    """A recipe's three chains."""

    initial: Chain
    up: Chain
    down: Chain

    def __bool__(self) -> bool:
        """Whether there is any operator."""
        return bool(self.initial.operators or self.up.operators or self.down.operators)

    @classmethod
    def of(cls, config: OperatorsConfig, differences: bool = False) -> Chains:
        """Raises UserError for unknown names and options, and for chains that cannot be.

        Args:
            differences: updates are differences from the broadcast already, as under privacy.
        """
        chains = {
            n: Chain.parse([o.model_dump() for o in getattr(config, n)], f"operators.{n}")
            for n in ("initial", "up", "down")
        }
        for name in ("initial", "down"):
            chain = chains[name]
            if chain.needs_reference:
                raise UserError(
                    f"operators.{name} has delta, which is against what a client got: it belongs to operators.up"
                )
            if chain.error_feedback:
                raise UserError(
                    f"operators.{name} has error_feedback, for which the server would keep a copy for every client: "
                    "it belongs to operators.up"
                )
        if differences and chains["up"].needs_reference:
            raise UserError("operators.up has delta, but under privacy updates are differences already: leave it out")
        for name, chain in chains.items():
            zeroing = [d["name"] for o, d in zip(chain.operators, chain.described, strict=True) if o.for_differences]
            if zeroing and not chain.needs_reference and not (differences and name == "up"):
                mend = "put delta before it" if name == "up" else "it belongs to operators.up, after delta"
                raise UserError(f"operators.{name} has {zeroing[0]}, which would zero most of the weights: {mend}")
        return cls(**chains)


class ServerChannel:
    """The server's end. A run whose chains are all empty has no channel: its payloads travel as they are."""

    def __init__(self, chains: Chains, seed: int) -> None:
        self.chains = chains
        self.seed = seed
        self._met: set[str] = set()
        self._references: dict[str, dict[int, dict[str, torch.Tensor]]] = {}  # client → round → what it got
        self._last: dict[str, torch.Tensor] | None = None

    def sent(self, assignment: Assignment, own_initial: bool) -> Assignment:
        """The assignment with its payload encoded.

        Args:
            own_initial: the payload is an initial one unlike those of rounds (an emulator), sent anew after a restart.
        """
        client, first = assignment.client, own_initial or assignment.client not in self._met
        chain = self.chains.initial if first else self.chains.down
        self._met.add(client)
        try:  # one generator for all clients: what is equal before is equal after, and is held once
            coded = chain.encode(assignment.payload, torch_generator(self.seed, "quantise", assignment.round))
        except CannotEncode as error:
            raise RunFailed(f"round {assignment.round} cannot be sent: {error}; finished rounds are kept") from error
        if self.chains.up.needs_reference and assignment.kind == "train":
            held = self._references.setdefault(client, {})
            held[assignment.round] = self._held((assignment.payload if chain.lossless else chain.decode(coded)).tensors)
            for old in sorted(held)[:-HELD]:
                del held[old]
        return replace(assignment, payload=coded)

    def opened(self, outcome: Outcome) -> Outcome:
        """The outcome of training with its payload decoded, or a `Failure` that says what is wrong with it.

        Called as it comes from the runtime: what waits anywhere after that is plain.
        """
        if not isinstance(outcome, Update):
            return outcome
        try:
            reference = self._references.get(outcome.client, {}).pop(outcome.round, None)
            return replace(outcome, payload=self.chains.up.decode(outcome.payload, reference))
        except BadPayload as error:
            return Failure(outcome.client, outcome.round, "bad_payload", str(error), outcome.cost)

    def notes(self) -> dict[str, Any]:
        """What a checkpoint has to hold: who got a first payload, where that differs from later ones."""
        differ = self.chains.initial.described != self.chains.down.described
        return {"met": sorted(self._met)} if differ else {}

    def load_notes(self, notes: Mapping[str, Any]) -> None:
        self._met = set(notes.get("met", ()))

    def _held(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A copy that later rounds do not touch; the last one again where it is the same."""
        last = self._last
        if last is None or set(last) != set(tensors) or not all(_same(last[n], t) for n, t in tensors.items()):
            last = {n: t.detach().cpu().clone() for n, t in tensors.items()}
            self._last = last
        return last


class ClientChannel:
    """A client's end; in a simulation it plays all clients in turn, `received` begins each turn."""

    def __init__(self, chains: Chains, seed: int) -> None:
        self.chains = chains
        self.seed = seed
        self._reference: dict[str, torch.Tensor] | None = None
        self._residual: Residual = {}

    def received(self, assignment: Assignment) -> Payload:
        """The plain payload of an assignment. Raises ClientFailed."""
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
        """Take up what `state` kept."""
        self._residual = dict(state.tensors) if state is not None else {}

    def encoded(self, payload: Payload, client: str, round: int) -> Payload:
        """What leaves the client. Raises ClientFailed."""
        generator = torch_generator(self.seed, "quantise", round, client)
        try:
            return self.chains.up.encode(payload, generator, self._reference, self._residual)
        except CannotEncode as error:
            raise ClientFailed("non_finite", str(error)) from error

    def state(self) -> Payload:
        """What error feedback has to send later, for the client's own store."""
        return Payload(dict(self._residual))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit, so that a NaN is itself and -0 is not 0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
