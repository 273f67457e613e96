"""Arithmetic on low-rank updates ΔW = s·B·A that never computes the dense product [out, in].

Legend: A [r, in], B [out, r]. A sum of products Σ c_k B_k A_k is stored as two stacks, B = [c_1 B_1 | c_2 B_2 | …]
[out, R] and A = [A_1; A_2; …] [R, in]. Its norms and singular values come from QR of the stacks and from R × R
matrices. This file does not know which algorithm uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block on one thread: thin QR, SVD, solve and products round differently with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


A_END, B_END = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LoraPair:
    """The names of one LoRA module's two factors, and of the base weight that they change."""

    a: str
    b: str
    weight: str


def find_lora_pairs(names: Iterable[str]) -> list[LoraPair]:
    """Find the LoRA modules among `names`, in order. Raises ValueError if a factor lacks its partner."""
    present = list(names)
    found = []
    for a in present:
        if not a.endswith(A_END):
            continue
        stem = a.removesuffix(A_END)
        if stem + B_END not in present:
            raise ValueError(f"the LoRA factor {a} has no partner {stem + B_END}: an adapter needs both")
        found.append(LoraPair(a, stem + B_END, stem.removeprefix("base_model.model.") + ".weight"))
    return found


@dataclass(frozen=True)
class LowRank:
    """The product B·A with B [out, R], A [R, in], both of one dtype."""

    b: torch.Tensor
    a: torch.Tensor

    @classmethod
    def stack(cls, terms: Iterable[tuple[float, torch.Tensor, torch.Tensor]]) -> LowRank:
        """Stack terms (c, B, A): the result stands for Σ c·B·A."""
        listed = list(terms)
        return cls(torch.cat([c * b for c, b, _ in listed], dim=1), torch.cat([a for _, _, a in listed], dim=0))

    def plus(self, other: LowRank, factor: float = 1.0) -> LowRank:
        """Return self + factor · other, as stacks."""
        return LowRank(torch.cat([self.b, factor * other.b], dim=1), torch.cat([self.a, other.a], dim=0))

    @one_thread()
    def norm(self) -> float:
        """Return the Frobenius norm of the product, by QR of both stacks.

        A difference of nearly equal products is exact.
        """
        return float(torch.linalg.matrix_norm(self._core()[1]))

    @one_thread()
    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (U [out, k], S [k], Vh [k, in]) of the product, k ≤ R. Signs are fixed: equal input, equal output."""
        qb, core, qa = self._core()
        u, s, vh = torch.linalg.svd(core, full_matrices=False)
        at = u.abs().argmax(dim=0)
        signs = torch.sign(u[at, torch.arange(u.shape[1])])
        signs[signs == 0] = 1
        return qb @ (u * signs), s, (vh * signs[:, None]) @ qa.T

    def truncate(self, rank: int) -> LowRank:
        """Return the best approximation of rank `rank` (Eckart–Young).

        B = U√S, A = √S Vh, padded with zeros if k < rank.
        """
        u, s, vh = self.svd()
        root = s[:rank].sqrt()
        b, a = u[:, :rank] * root, root[:, None] * vh[:rank]
        missing = rank - root.numel()
        if missing > 0:
            b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
            a = torch.cat([a, a.new_zeros(missing, a.shape[1])], dim=0)
        return LowRank(b, a)

    def compact(self, tolerance: float = 1e-7) -> LowRank:
        """Return the same product with as few columns as possible. The rest has at most `tolerance` of the norm."""
        u, s, vh = self.double().svd()
        tail = s.square().flip(0).cumsum(0).flip(0).sqrt()  # tail[i] = ‖s[i:]‖
        rank = int((tail > tolerance * tail[:1]).sum())
        root = s[:rank].sqrt()
        return LowRank((u[:, :rank] * root).to(self.b.dtype), (root[:, None] * vh[:rank]).to(self.a.dtype))

    def double(self) -> LowRank:
        return LowRank(self.b.double(), self.a.double())

    def single(self) -> LowRank:
        return LowRank(self.b.float(), self.a.float())

    @property
    def rank(self) -> int:
        """Columns of B; the rank of the product is at most this."""
        return self.b.shape[1]

    @one_thread()
    def dense(self) -> torch.Tensor:
        """Return the product itself [out, in]: for tests and for merging into a weight, not for aggregation."""
        return self.b @ self.a

    def _core(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (Q_B, core, Q_A) with core = R_B R_Aᵀ and B·A = Q_B · core · Q_Aᵀ."""
        qb, rb = torch.linalg.qr(self.b)
        qa, ra = torch.linalg.qr(self.a.T)
        return qb, rb @ ra.T, qa


@one_thread()
def subspace_iteration(matrix: torch.Tensor, rank: int, generator: torch.Generator, rounds: int = 8) -> LowRank:
    """Approximate a matrix by its leading `rank` singular directions, by subspace iteration.

    Halko et al., arXiv 0909.4061, Algorithm 4.4, with 8 extra directions; exact if the matrix has no more than those.
    The
    result is balanced as in `LowRank.truncate`.

    Args:
        matrix: [out, in], float64.
        generator: draws the first directions.
        rounds: iterations.
    """
    width = min(rank + 8, *matrix.shape)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    return LowRank(basis, basis.T @ matrix).truncate(rank)


def relative_gap(result: Mapping[str, LowRank], exact: Mapping[str, LowRank]) -> float:
    """Return ‖result − exact‖ / ‖exact‖ over all weights together (Frobenius); 0 if both are zero."""
    gap = sum(exact[w].plus(result[w], -1.0).norm() ** 2 if w in result else exact[w].norm() ** 2 for w in exact)
    size = sum(low.norm() ** 2 for low in exact.values())
    return float((gap / size) ** 0.5) if size else float(gap**0.5)
