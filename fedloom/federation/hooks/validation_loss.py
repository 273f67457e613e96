"""The loss on the clients' validation data after every k-th round, for whoever chooses settings by it; changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedloom.data.corpus import Partition
from fedloom.federation.hooks.base import Hook, HookOptions, ServerRound, check_validation
from fedloom.recipe.recipe import Recipe

if TYPE_CHECKING:
    from fedloom.algorithms.base import Algorithm


class ValidationLoss(Hook):
    """Numbers: `loss`, the mean over all tokens of the clients' validation answers."""

    class Options(HookOptions):
        every: int = Field(1, ge=1, description="measure after every k rounds")

    options: Options
    tells_of_data: ClassVar = True

    def check(self, recipe: Recipe, algorithm: Algorithm, clients: Partition) -> None:
        check_validation("validation_loss", recipe, clients)

    def validates(self, round: int) -> bool:
        return round % self.options.every == 0

    def round_end(self, at: ServerRound) -> None:
        if at.validation is not None and self.validates(at.number):
            self.numbers = {"loss": at.validation}
