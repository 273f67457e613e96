"""Each client's view of the corpus: its own tokenised sequences, and the questions that its answers are scored on.

In a simulation one object serves all clients; on a site it holds that site's data alone. It does not know the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedloom.data.tokenization import TokenisedCorpus
from fedloom.types import Corpus, Example, Partition


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
