"""What rules look at: what is known of a run before its data, with its data, and with its model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fedloom.algorithms.base import Algorithm, Properties
from fedloom.common import registry
from fedloom.data.corpus import Partition
from fedloom.federation.hooks.base import Hook
from fedloom.federation.hooks.calls import parse_hook
from fedloom.federation.rounds.devices import Fleet, bytes_needed
from fedloom.federation.rounds.schedule import Schedule
from fedloom.federation.runtime import Capabilities
from fedloom.models.adapters import AdaptedModel
from fedloom.models.loading import pick_device
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.train import TrainConfig


@dataclass(frozen=True)
class RecipeFacts:
    """What a recipe alone tells. Every part raises UserError for a name that is not registered."""

    recipe: Recipe

    @cached_property
    def algorithm(self) -> type[Algorithm]:
        found: type[Algorithm] = registry.algorithms.get(self.recipe.algorithm.name)
        return found

    @property
    def properties(self) -> Properties:
        return self.algorithm.properties

    @property
    def can(self) -> Capabilities:
        """What the runtime can do."""
        found: Capabilities = registry.runtimes.get(self.recipe.runtime.name).capabilities
        return found

    @cached_property
    def hooks(self) -> dict[str, Hook]:
        return {config.name: parse_hook(config) for config in self.recipe.hooks}

    @property
    def strategy(self) -> str:
        """How ranks work together, where the recipe has any: ddp, fsdp, or nothing."""
        return (self.recipe.runtime.parallel or "ddp") if self.recipe.runtime.ranks > 1 else ""

    @cached_property
    def device(self) -> str:
        return pick_device(self.recipe.runtime.device)


@dataclass(frozen=True)
class DataFacts:
    """A recipe with its clients, once their data are found; between sites, once it is known who takes part.

    Attributes:
        recipe: with everything in it that recipe and data decide.
    """

    recipe: Recipe
    algorithm: Algorithm
    clients: Partition

    @property
    def training(self) -> int:
        """How many clients have training data."""
        return len(self.clients.training_clients)

    @property
    def sampled(self) -> int:
        return self.recipe.federation.sampled(self.training)

    @property
    def counted(self) -> int:
        """How many updates make a round."""
        asynchronous = self.algorithm.properties.asynchronous
        return self.algorithm.buffer(self.sampled) if asynchronous else self.sampled


@dataclass(frozen=True)
class ModelFacts:
    """A recipe with its model, before the first round.

    Attributes:
        recipe: with everything in it that recipe and data decide.
        train: the recipe's section with precision and packing chosen.
        elsewhere: clients have devices of their own, which this process does not know.
        fleet: simulated devices, None for a recipe without.
    """

    recipe: Recipe
    train: TrainConfig
    model: AdaptedModel
    schedule: Schedule
    fleet: Fleet | None
    elsewhere: bool

    @property
    def packed(self) -> bool:
        return self.train.packing == "on"

    @cached_property
    def needed(self) -> int:
        """Bytes of memory that training takes on a client's device."""
        return bytes_needed(self.recipe, self.model)

    @cached_property
    def fitting(self) -> tuple[str, ...]:
        """The clients that can be sampled and whose memory holds the model."""
        small = self.fleet.without_room(self.needed) if self.fleet is not None else ()
        return tuple(client for client in self.schedule.training if client not in small)

    @property
    def coming(self) -> int:
        """How many of those can ever end their work."""
        return sum(self.fleet is None or self.fleet.comes_back(client) for client in self.fitting)

    @property
    def fewest(self) -> int:
        return max(1, self.schedule.federation.min_clients)

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for; None where it does not say."""
        found = getattr(self.model.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        return int(found) if found else None
