"""What local training minimises: `sft`, the likelihood of the answers, or `dpo`, the preference of one answer to another.

DPO is Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, equation 7; in federation, Ye et al.,
"OpenFedLLM", arXiv 2402.06954. With y_w the preferred and y_l the rejected answer to x,

    h = β [ (log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x)) ]        the margin
    L = −(1 − ε) log σ(h) − ε log σ(−h)                                                    a pair's loss

with ε = 0 in the paper; ε > 0 takes that share of the labels to be wrong (conservative DPO). Log-probabilities are sums
over an answer's tokens. π_ref is the base without its adapter (models/reference.py): no second model, the two numbers
of each training pair are computed once in a client's process and kept. Those of held-out pairs are computed in the
very batches that they are compared with: a model that nothing has changed then has margins of exactly 0, and not of
rounding, whose sign would be counted. A step's loss is the mean over its pairs, as under `sft` it is over its tokens.

Both objectives make batches; `unit_losses` tells from a batch what it is for, so that every algorithm's own loss takes
both without a line about either. This file does not know clients or rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.nn.functional import logsigmoid

from fedloom.data.batching import Batch, Pairs, collate
from fedloom.data.tokenization import TokenisedCorpus
from fedloom.models.adapters import AdaptedModel
from fedloom.models.forward import token_losses
from fedloom.models.reference import reference
from fedloom.recipe.recipe import TrainConfig
from fedloom.training.flops import flops_of
from fedloom.training.precision import autocast


def unit_losses(model: AdaptedModel, batch: Batch) -> torch.Tensor:
    """The loss of each of the batch's units, float32: [tokens], or [pairs] of a batch of pairs."""
    losses = token_losses(model, batch)
    if not isinstance(batch, Pairs):
        return losses
    h = margins(log_probabilities(batch, losses), batch)
    return -(1 - batch.smoothing) * logsigmoid(h) - batch.smoothing * logsigmoid(-h)


def log_probabilities(batch: Batch, losses: torch.Tensor) -> torch.Tensor:
    """log π of each sequence's answer, [sequences], from the losses of its tokens, [S]."""
    counts = torch.bincount(batch.owners, minlength=len(batch.lengths)).tolist()
    return -torch.stack([part.sum() for part in torch.split(losses, counts)])


def margins(own: torch.Tensor, batch: Pairs) -> torch.Tensor:
    """h of each pair, [pairs]: equation 7's argument of σ. `own`: log π of each sequence."""
    gained = (own - batch.reference.to(own.device)).view(-1, 2)  # columns: preferred, rejected
    return batch.beta * (gained[:, 0] - gained[:, 1])


class Objective(Protocol):
    """What a client needs of it."""

    def prepare(self, model: AdaptedModel, sequences: TokenisedCorpus, examples: Sequence[int], packed: bool) -> int:
        """Find out whatever has to be known of these examples before training on them; the operations that took."""
        ...

    def batch(self, sequences: TokenisedCorpus, examples: Sequence[int], *, packed: bool, pad: int) -> Batch:
        """One forward pass's batch."""
        ...

    def sums(
        self, model: AdaptedModel, sequences: TokenisedCorpus, examples: Sequence[int], *, batch_size: int, packed: bool
    ) -> dict[str, float]:
        """What is measured on held-out examples besides the loss of their tokens: sums that a site may send."""
        ...


class Sft:
    """Supervised fine-tuning: the likelihood of each answer's tokens."""

    def __init__(self, config: TrainConfig) -> None:
        pass

    def prepare(self, model: AdaptedModel, sequences: TokenisedCorpus, examples: Sequence[int], packed: bool) -> int:
        """Nothing."""
        return 0

    def batch(self, sequences: TokenisedCorpus, examples: Sequence[int], *, packed: bool, pad: int) -> Batch:
        return collate([sequences[i] for i in examples], packed=packed, pad=pad, examples=examples)

    def sums(
        self, model: AdaptedModel, sequences: TokenisedCorpus, examples: Sequence[int], *, batch_size: int, packed: bool
    ) -> dict[str, float]:
        return {}


class Dpo:
    """Direct preference optimisation."""

    def __init__(self, config: TrainConfig) -> None:
        self._beta, self._smoothing, self._precision = config.dpo_beta, config.dpo_smoothing, config.precision
        self._known: dict[int, tuple[float, float]] = {}  # example → log π_ref of the preferred and the rejected answer
        self._held_out: dict[tuple[int, ...], torch.Tensor] = {}  # a held-out batch's examples → log π_ref, [sequences]

    def prepare(self, model: AdaptedModel, sequences: TokenisedCorpus, examples: Sequence[int], packed: bool) -> int:
        """Each pair alone, so that its two numbers do not depend on what else is asked."""
        missing = [i for i in dict.fromkeys(examples) if i not in self._known]
        if not missing:
            return 0
        flops, taken = flops_of(model), 0
        with autocast(model.device, self._precision), reference(model):  # compared with what is computed like it
            for i in missing:
                batch = self._collated(model, sequences, [i], packed)
                preferred, rejected = log_probabilities(batch, token_losses(model, batch)).tolist()
                self._known[i] = preferred, rejected
                taken += flops.without_adapter(batch)
        return taken

    def batch(self, sequences: TokenisedCorpus, examples: Sequence[int], *, packed: bool, pad: int) -> Pairs:
        pairs = [answer for i in examples for answer in sequences.pair(i)]
        made = collate(pairs, packed=packed, pad=pad, examples=examples)
        return self._pairs(made, torch.tensor([value for i in examples for value in self._known[i]]))

    def _pairs(self, batch: Batch, known: torch.Tensor) -> Pairs:
        return Pairs(**batch.__dict__, reference=known, beta=self._beta, smoothing=self._smoothing)

    def _collated(
        self, model: AdaptedModel, sequences: TokenisedCorpus, examples: Sequence[int], packed: bool
    ) -> Batch:
        pairs = [answer for i in examples for answer in sequences.pair(i)]
        return collate(pairs, packed=packed, pad=model.tokenizer.pad_token_id or 0, examples=examples)

    @torch.no_grad()
    def sums(
        self, model: AdaptedModel, sequences: TokenisedCorpus, examples: Sequence[int], *, batch_size: int, packed: bool
    ) -> dict[str, float]:
        """pairs; preferred, those whose margin is above 0; the sum of margins and of losses, without smoothing.

        A margin of 0 prefers neither answer and counts a half, so a model that nothing has changed wins half of its pairs.
        """
        found = [torch.zeros(0)]
        size = max(1, batch_size // 2)  # a pair is two sequences
        for start in range(0, len(examples), size):
            batch = self._collated(model, sequences, examples[start : start + size], packed).to(model.device)
            if batch.examples not in self._held_out:
                with reference(model):
                    self._held_out[batch.examples] = log_probabilities(batch, token_losses(model, batch)).cpu()
            own = log_probabilities(batch, token_losses(model, batch))
            found.append(margins(own, self._pairs(batch, self._held_out[batch.examples])).cpu())
        h = torch.cat(found).double()
        return {
            "pairs": len(h),
            "preferred": float((h > 0).sum() + 0.5 * (h == 0).sum()),
            "margin_sum": float(h.sum()),
            "preference_loss_sum": float(-logsigmoid(h).sum()),
        }


#: `train.objective` → what makes it from the section.
OBJECTIVES: dict[str, Callable[[TrainConfig], Objective]] = {"sft": Sft, "dpo": Dpo}
