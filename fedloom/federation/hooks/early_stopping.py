"""Early stopping of the federation: the run ends when the loss on the clients' validation data no longer falls.

After every round (or every k-th) each client with validation data measures what would be deployed; the mean over all
their tokens has to fall by more than `min_delta` below the lowest so far. After `patience` measurements in a row that do
not, the round is the last: it is checkpointed, measured on the test data and saved as the last round of any run is
(Prechelt, "Early Stopping – But When?", 1998, criterion UP with rounds for strips). The test data plays no part in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedloom.data.corpus import Partition
from fedloom.federation.hooks.base import Hook, HookOptions, ServerRound, check_validation
from fedloom.recipe.recipe import Recipe

if TYPE_CHECKING:
    from fedloom.algorithms.base import Algorithm


class EarlyStopping(Hook):
    """Kept: `best` and its `best_round`, and `waited`, measurements since then without a better one."""

    class Options(HookOptions):
        patience: int = Field(3, ge=1, description="measurements in a row without improvement after which the run ends")
        min_delta: float = Field(0.0, ge=0, description="an improvement is a fall by more than this, in nats a token")
        every: int = Field(1, ge=1, description="measure after every k rounds")

    options: Options
    tells_of_data: ClassVar = True

    def check(self, recipe: Recipe, algorithm: Algorithm, clients: Partition) -> None:
        check_validation("early_stopping", recipe, clients)

    def validates(self, round: int) -> bool:
        return round % self.options.every == 0

    def round_end(self, at: ServerRound) -> None:
        if at.validation is None or not self.validates(at.number):
            return
        best, waited = self.kept.meta.get("best"), int(self.kept.meta.get("waited", 0))
        if best is None or at.validation < best - self.options.min_delta:
            self.kept.meta = {"best": at.validation, "best_round": at.number, "waited": 0}
        else:
            self.kept.meta = {**self.kept.meta, "waited": waited + 1}
        self.numbers = {"validation_loss": at.validation, "waited": float(self.kept.meta["waited"])}
        if self.kept.meta["waited"] >= self.options.patience:
            at.stop = (
                f"the validation loss {at.validation:.4f} is the {self.options.patience}. in a row that is not below "
                f"{self.kept.meta['best']:.4f}, that of round {self.kept.meta['best_round']}"
            )
