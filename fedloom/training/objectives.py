"""Objectives of local training: `sft`, the likelihood of the answers, or `dpo`, the preference of one answer to another.

DPO is Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, equation 7; in federation, Ye et al.,
"OpenFedLLM", arXiv 2402.06954. With y_w the preferred and y_l the rejected answer to x,

    h = β [ (log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x)) ]        the margin
    L = −(1 − ε) log σ(h) − ε log σ(−h)                                                    a pair's loss

with ε = 0 in the paper; ε > 0 assumes that this share of the labels is wrong (conservative DPO). Log-probabilities are sums
over an answer's tokens. π_ref is the base without its adapter (models/reference.py), so there is no second model. The
reference values of a training pair are computed once in a client's process and kept. Those of held-out pairs are computed
in the same batches as the model's own. An untrained adapter then has margins of exactly 0, instead of rounding errors whose
sign would count. A step's loss is the mean over its pairs; under `sft` it is the mean over its tokens.

Both objectives build batches, and `unit_losses` finds the objective from the batch's class. So an algorithm's own loss
works with both. This file does not know clients or rounds.
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
    """Return the loss of each of the batch's units, float32: [tokens], or [pairs] of a batch of pairs."""
    losses = token_losses(model, batch)
    if not isinstance(batch, Pairs):
        return losses
    h = margins(log_probabilities(batch, losses), batch)
    return -(1 - batch.smoothing) * logsigmoid(h) - batch.smoothing * logsigmoid(-h)


def log_probabilities(batch: Batch, losses: torch.Tensor) -> torch.Tensor:
    """Return log π of each sequence's answer, [sequences], from the losses of its tokens, [S]."""
    counts = torch.bincount(batch.owners, minlength=len(batch.lengths)).tolist()
    return -torch.stack([part.sum() for part in torch.split(losses, counts)])


def margins(own: torch.Tensor, batch: Pairs) -> torch.Tensor:
    """Return h of each pair, [pairs]: equation 7's argument of σ. `own`: log π of each sequence."""
    gained = (own - batch.reference.to(own.device)).view(-1, 2)  # columns: preferred, rejected
    return batch.beta * (gained[:, 0] - gained[:, 1])


class Objective(Protocol):
    """The methods that a client calls."""

    def prepare(self, model: AdaptedModel, sequences: TokenisedCorpus, examples: Sequence[int], packed: bool) -> int:
        """Compute values of these examples that training needs; returns the floating-point operations that it took."""
        ...

    def batch(self, sequences: TokenisedCorpus, examples: Sequence[int], *, packed: bool, pad: int) -> Batch:
        """Build the batch of one forward pass."""
        ...

    def sums(
        self, model: AdaptedModel, sequences: TokenisedCorpus, examples: Sequence[int], *, batch_size: int, packed: bool
    ) -> dict[str, float]:
        """Return further sums over held-out examples, in addition to token losses. A site may send them."""
        ...


class Sft:
    """Supervised fine-tuning: the likelihood of each answer's tokens."""

    def __init__(self, config: TrainConfig) -> None:
        pass

    def prepare(self, model: AdaptedModel, sequences: TokenisedCorpus, examples: Sequence[int], packed: bool) -> int:
        """Do nothing: no value is needed."""
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
        self._known: dict[int, tuple[float, float]] = {}  # example → log π_ref of the preferred and rejected answer
        self._held_out: dict[tuple[int, ...], torch.Tensor] = {}  # a held-out batch's examples → log π_ref, [sequences]

    def prepare(self, model: AdaptedModel, sequences: TokenisedCorpus, examples: Sequence[int], packed: bool) -> int:
        """Compute log π_ref of each pair in a batch of its own, so that it does not depend on other pairs."""
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
        """Return the sums of pairs, of pairs with a margin above 0 (`preferred`), of margins and of losses.

        Losses are without smoothing. A margin of 0 counts as half a pair, so an untrained adapter wins half of its pairs.
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


#: `train.objective` → the class that is built from the recipe's `train` section.
OBJECTIVES: dict[str, Callable[[TrainConfig], Objective]] = {"sft": Sft, "dpo": Dpo}
