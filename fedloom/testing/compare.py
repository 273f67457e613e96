"""Compare what two runs, payloads or servers ended with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedloom.algorithms.base import Algorithm
from fedloom.messages.types import Payload, Update


def aggregated(server: Algorithm, updates: list[Update]) -> torch.Tensor:
    """What is deployed after one round of these updates: [numel] float64."""
    server.aggregate(iter(updates))
    server.server_step()
    return server.deployed().adapter.flat.detach().cpu().double()


def flat(payload: Payload) -> torch.Tensor:
    parts = [payload.tensors[n].double().reshape(-1) for n in sorted(payload.tensors)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and float((one - other).norm()) <= 1e-5 * max(1.0, float(other.norm()))


def equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one.cpu(), other.cpu())


def same(one: Payload, other: Payload) -> bool:
    """Whether two payloads have the same names, numbers and metadata."""
    names = one.tensors.keys() == other.tensors.keys()
    return one.meta == other.meta and names and all(equal(t, other.tensors[n]) for n, t in one.tensors.items())


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names whose values are not the same in both, a few of them."""
    return sorted(n for n in {*one, *other} if one.get(n) != other.get(n))[:3]


def size(payload: Payload) -> int:
    """Bytes of its tensors."""
    return sum(t.numel() * t.element_size() for t in payload.tensors.values())
