"""Watch an algorithm during a run: a subclass that notes what its methods get and give, and changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from fedloom.algorithms.base import Algorithm
from fedloom.messages.types import Payload, Update
from fedloom.models.adapters import AdaptedModel
from fedloom.models.attach import Models
from fedloom.models.layout import Adapter, Layout

#: Attributes of every algorithm that are no state of its own.
COMMON = frozenset({"model", "options", "adapter", "seed", "client", "round", "evaluating"})


@dataclass
class Log:
    """What a run showed of one algorithm.

    Attributes:
        servers: the server halves that were made, in order.
        down, up, kept: (client, round) → what the client received before training, sent, and keeps.
        updates: round by round, what the server aggregated.
        refused: updates that `accept` refused, with its sentence and the layout that was announced.
        states: the server's state after each round, and `attributes` then: name → fingerprint.
        loaded: the same fingerprints right after a resumed run loaded its checkpoint.
        remembered: plain attributes of the client half that one client's training left for the next one.
    """

    servers: list[Algorithm] = field(default_factory=list)
    down: dict[tuple[str, int], Payload] = field(default_factory=dict)
    up: dict[tuple[str, int], Payload] = field(default_factory=dict)
    kept: dict[tuple[str, int], Payload] = field(default_factory=dict)
    updates: list[list[Update]] = field(default_factory=list)
    refused: list[tuple[Update, str, Layout | None]] = field(default_factory=list)
    states: list[Payload] = field(default_factory=list)
    attributes: list[dict[str, str]] = field(default_factory=list)
    loaded: dict[str, str] | None = None
    remembered: set[str] = field(default_factory=set)


def copied(payload: Payload) -> Payload:
    """A copy on the CPU that later training does not touch."""
    return Payload({n: t.detach().cpu().clone() for n, t in payload.tensors.items()}, dict(payload.meta))


def probe(
    cls: type[Algorithm], log: Log, *, fresh: bool = False, carried: frozenset[str] = frozenset()
) -> type[Algorithm]:
    """A subclass of `cls` that writes into `log`.

    Args:
        fresh: replace the client half by a new one before each client's training, as other runtimes do.
        carried: attributes that the new one is given from the old one all the same.
    """

    class Probe(cls):  # type: ignore[misc, valid-type]
        def server_model(self, models: Models) -> AdaptedModel:
            model: AdaptedModel = super().server_model(models)
            log.servers.append(self)
            return model

        def client_model(self, models: Models, payload: Payload) -> AdaptedModel:
            self.__dict__["_check_made"] = (models, payload)
            model: AdaptedModel = super().client_model(models, payload)
            return model

        def begin(self, client: str, round: int, kept: Payload | None) -> None:
            if fresh and "_check_made" in self.__dict__:
                self._renew()
            super().begin(client, round, kept)

        def _renew(self) -> None:
            old, (models, payload) = dict(self.__dict__), self.__dict__["_check_made"]
            self.__dict__.clear()
            self.__init__(old["options"], old["seed"], old["adapter"])  # type: ignore[misc]
            self.client_model(models, payload)
            self.evaluating = old["evaluating"]
            before, now = fingerprints(old), fingerprints(self.__dict__)
            log.remembered |= {n for n in before if before[n] != now.get(n)} - {"kept"}
            self.__dict__.update({n: old[n] for n in carried if n in old})

        def receive(self, payload: Payload) -> None:
            if not self.evaluating:
                log.down[self.client, self.round] = copied(payload)
            super().receive(payload)

        def shared_state(self) -> Payload:
            sent: Payload = super().shared_state()
            log.up[self.client, self.round] = copied(sent)
            return sent

        def client_state(self) -> Payload:
            kept: Payload = super().client_state()
            log.kept[self.client, self.round] = copied(kept)
            return kept

        def accept(self, update: Update) -> None:
            try:
                super().accept(update)
            except ValueError as error:
                log.refused.append((replace(update, payload=copied(update.payload)), str(error), self.update_layout()))
                raise

        def aggregate(self, updates: Iterator[Update]) -> Mapping[str, float]:
            seen: list[Update] = []
            log.updates.append(seen)

            def noted() -> Iterator[Update]:
                for update in updates:
                    seen.append(replace(update, payload=copied(update.payload)))
                    yield update
                    del update

            metrics: Mapping[str, float] = super().aggregate(noted())
            return metrics

        def server_step(self) -> None:
            super().server_step()
            log.states.append(copied(self.server_state()))
            log.attributes.append(fingerprints(self.__dict__))

        def load_server_state(self, state: Payload) -> None:
            super().load_server_state(state)
            log.loaded = fingerprints(self.__dict__)

    Probe.__name__, Probe.__qualname__, Probe.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Probe


# ------------------------------------------------------------------ fingerprints of attributes


def fingerprints(attributes: Mapping[str, Any]) -> dict[str, str]:
    """Name → a digest of the value, for values that are data; models, functions and the like are left out."""
    found = {n: _digest(v) for n, v in attributes.items() if n not in COMMON and not n.startswith("_check_")}
    return {n: d for n, d in found.items() if d is not None}


def _digest(value: Any) -> str | None:
    digest = hashlib.sha256()
    return digest.hexdigest() if _feed(value, digest.update, 6) else None


def _feed(value: Any, update: Callable[[bytes], None], depth: int) -> bool:
    """Hash a value; false where it holds nothing that is data."""
    update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().contiguous()
        update(f"{dense.dtype} {tuple(dense.shape)}".encode())
        update(dense.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, Adapter):
        return _feed(value.flat, update, depth)
    elif value is None or isinstance(value, bool | int | float | str | bytes | complex):
        update(repr(value).encode())
    elif isinstance(value, Mapping) and depth:
        for key in value:
            update(repr(key).encode())
            _feed(value[key], update, depth - 1)
    elif isinstance(value, list | tuple) and depth:
        for item in value:
            _feed(item, update, depth - 1)
    elif isinstance(value, set | frozenset):
        update(repr(sorted(map(repr, value))).encode())
    elif depth and _plain(value):
        return _feed(vars(value), update, depth - 1)
    else:
        return False
    return True


def _plain(value: Any) -> bool:
    """Whether it is an object of data: not a model, nor anything that can be called."""
    opaque = isinstance(value, torch.nn.Module | AdaptedModel | Models | torch.Generator | type) or callable(value)
    return not opaque and (is_dataclass(value) or hasattr(value, "__dict__"))
