"""Each client's view of the corpus: its own tokenised sequences, and the questions that its answers are scored on.

In a simulation one object serves all clients; on a site it holds that site's data alone. It does not know the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.common.errors import UserError
from fedloom.common.randomness import numpy_generator
from fedloom.data.corpus import Corpus, Example, Partition
from fedloom.data.prompts import Template
from fedloom.data.splitters import select_questions, select_test_set
from fedloom.data.tokenization import TokenisedCorpus, tokenise
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.sections import count_of

if TYPE_CHECKING:
    from fedloom.evaluation.suites import Suite

log = logging.getLogger(__name__)


def measured_clients(recipe: Recipe, clients: Partition) -> tuple[str, ...]:
    """Those that hold test data, or as many of them as evaluation.clients says, in order: the same ones every time."""
    testing = clients.testing_clients
    wanted = recipe.evaluation.clients
    count = count_of(wanted, len(testing))
    if count > len(testing):
        raise UserError(
            f"evaluation.clients={wanted} but only {len(testing)} clients hold test data: ask for fewer, or null for all"
        )
    if count == len(testing):
        return testing
    chosen = numpy_generator(recipe.seed, "measured").choice(len(testing), count, replace=False)
    return tuple(testing[i] for i in sorted(chosen))


def federated_data(
    recipe: Recipe, corpus: Corpus, clients: Partition, template: Template, suite: Suite | None, cache: Path
) -> FederatedData:
    """Every client's tokens and questions. A corpus with a test set of its own is asked that, by the server."""
    sequences = tokenise(corpus, template, recipe.data.max_length, cache)
    if sequences.truncated:
        log.warning(
            f"{sequences.truncated} of {len(sequences)} sequences are over {recipe.data.max_length} tokens and lost "
            f"{sequences.truncated_tokens} tokens in all (prompts from their start, answers from their end)"
        )
    limit = recipe.evaluation.limit
    measured = measured_clients(recipe, clients)
    if suite is None:
        return FederatedData(corpus, sequences, clients, {}, measured=measured)
    if corpus.test:
        asked = [corpus.test[i] for i in select_test_set(corpus, limit, recipe.seed)]
        suite.check(asked)
        return FederatedData(corpus, sequences, clients, {}, asked, measured)
    asking = replace(clients, shards={client: clients.shards[client] for client in measured})
    questions = select_questions(corpus, asking, limit, recipe.seed)
    suite.check(corpus.examples[i] for indices in questions.values() for i in indices)
    return FederatedData(corpus, sequences, clients, questions, measured=measured)


@dataclass(frozen=True)
class ClientData:
    """What one client holds. Indices point into `sequences`; `questions` are scored by the paired evaluation."""

    sequences: TokenisedCorpus
    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    questions: tuple[Example, ...]


class FederatedData:
    """All clients' data, looked up by client.

    Args:
        questions: client → indices of its test examples that are scored; empty where the corpus has a test set of its
            own, which the server holds.
        measured: the clients whose test data evaluations use; None is all.
    """

    def __init__(
        self,
        corpus: Corpus,
        sequences: TokenisedCorpus,
        partition: Partition,
        questions: Mapping[str, Sequence[int]],
        server_questions: Sequence[Example] = (),
        measured: Sequence[str] | None = None,
    ) -> None:
        self.corpus = corpus
        self.sequences = sequences
        self.partition = partition
        self.server_questions = tuple(server_questions)
        self._questions = questions
        self.measured = partition.testing_clients if measured is None else tuple(measured)

    def client(self, name: str) -> ClientData:
        shard = self.partition.shards[name]
        questions = tuple(self.corpus.examples[i] for i in self._questions.get(name, ()))
        return ClientData(self.sequences, shard.train, shard.validation, shard.test, questions)

    def pooled(self) -> ClientData:
        """The test data of all clients that are measured, and every question, as the baselines are scored on it."""
        test = tuple(i for client in self.measured for i in self.partition.shards[client].test)
        asked = [self.corpus.examples[i] for client in self.measured for i in self._questions.get(client, ())]
        return ClientData(self.sequences, (), (), test, tuple(asked) + self.server_questions)
