"""What is deployed, measured by those who hold data: clients on their own, the server on its own where it has some.

    deployed → each client's sums → pooled loss and score, client by client → what the event says

Sums travel and means are made here (evaluation/means.py). This file does not know when an evaluation is due.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from fedloom.algorithms.base import Algorithm, Deployed
from fedloom.common.errors import RunFailed
from fedloom.evaluation import means as measured
from fedloom.evaluation.means import Sums
from fedloom.federation.hooks.calls import Hooks
from fedloom.federation.record.checkpoints import Evaluation
from fedloom.federation.record.client_table import ClientTable
from fedloom.federation.rounds.dispatcher import Dispatcher
from fedloom.federation.rounds.schedule import Schedule
from fedloom.messages.types import Cost, Failure

#: Measures a deployed model on data that the server holds: sums, as of a client (zeros for the loss where only questions
#: are asked).
ServerMeasure = Callable[[Deployed], Sums]


class Evaluator:
    """Measures what is deployed, and has personal results saved.

    Args:
        schedule: when to evaluate, and which clients measure.
        server_measure: for a corpus whose test set the server holds, and for a result that no client holds.
        validating: clients that hold validation data, in order.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        dispatcher: Dispatcher,
        schedule: Schedule,
        table: ClientTable,
        *,
        hooks: Hooks | None = None,
        server_measure: ServerMeasure | None = None,
        validating: Sequence[str] = (),
    ) -> None:
        self.table = table
        self._algorithm, self._dispatcher, self._schedule = algorithm, dispatcher, schedule
        self._hooks, self._server_measure, self._validating = hooks or Hooks(), server_measure, validating

    def due(self, finished: int) -> bool:
        """Whether an evaluation belongs after `finished` rounds."""
        return self._schedule.evaluates(finished)

    @property
    def pools(self) -> bool:
        """Whether each client's own model can be measured on everybody's test data, which only a simulation has."""
        return self._algorithm.properties.personal and self._dispatcher.runtime.capabilities.pooled_tests

    def after(self, finished: int, pooled: bool) -> tuple[Evaluation, Cost, int]:
        """(loss and score after `finished` rounds as the event has them, what it cost, how many clients failed).

        Personal models differ from client to client, so after the last round each is also measured on everybody's test
        data: the mean of that is what other settings are compared with. Where clients hold an emulator, what they measure
        is that (`emulator`, and `clients`), and the server measures the result on everybody's test data,
        where it has them.

        Args:
            pooled: measure each client's own model on everybody's test data, too.
        """
        started = time.perf_counter()
        own, cost, failures = self.measure(finished, "test", self._schedule.measuring)
        personal, emulator = self._algorithm.properties.personal, None
        if self._algorithm.properties.offsite:
            emulator = measured.combine_clients(own)
            found = measured.means(self._asked(self._server_measure) if self._server_measure else measured.add_sums(()))
        elif pooled:
            sums, spent, failed = self.measure(finished, "pooled", self._schedule.measuring)
            cost, failures = cost + spent, failures + failed
            found = measured.mean_over_models(sums)
        else:
            asks = self._server_measure if self._dispatcher.terms.score and not (personal and finished) else None
            found = measured.combine_clients(own, self._asked(asks) if asks else None)
        told = self.table.told(finished, {name: measured.means(m) for name, m in own.items()})
        result = Evaluation(
            found["loss"],
            found["score"],
            found["questions"],
            int(sum(m.tokens for m in own.values())),
            told["clients"],
            told["spread"],
            seconds=round(time.perf_counter() - started, 3),
            pooled=pooled,
            emulator=emulator,
            preference=measured.preference_means(own),
        )
        return result, cost, failures

    def measure(self, finished: int, dataset: str, clients: Sequence[str]) -> tuple[dict[str, Sums], Cost, int]:
        """(client → sums of those that could be measured, what it cost, how many failed)."""
        sums: dict[str, Sums] = {}
        cost, failures = Cost(), 0
        with self._hooks.deploying(self._algorithm):
            for outcome in self._dispatcher.outcomes("evaluate", finished, clients, dataset):
                cost += outcome.cost
                if isinstance(outcome, Failure):
                    self._dispatcher.failed(outcome, "evaluate")
                    failures += 1
                else:
                    sums[outcome.client] = Sums.of(outcome.metrics)
        return {c: sums[c] for c in clients if c in sums}, cost, failures

    def validate(self, finished: int) -> tuple[float | None, Cost, int]:
        """(mean loss of a token on the clients' validation data, what it cost, how many clients failed)."""
        sums, cost, failures = self.measure(finished, "validation", self._validating)
        return measured.combine_clients(sums)["loss"], cost, failures

    def save_personal(self, finished: int) -> tuple[dict[str, str], Cost]:
        """Have every testing client write its own adapter: (client → sha256 of it, what it cost). Raises RunFailed."""
        digests: dict[str, str] = {}
        cost, dispatcher = Cost(), self._dispatcher
        assignments = (dispatcher.assignment(client, "save", finished) for client in self._schedule.testing)
        for outcome in dispatcher.received(assignments, "save"):
            cost += outcome.cost
            if isinstance(outcome, Failure):
                raise RunFailed(f"client {outcome.client} could not save its adapter: {outcome.detail}")
            digests[outcome.client] = str(outcome.payload.meta["adapter_sha256"])
        return digests, cost

    def _asked(self, measure: ServerMeasure) -> Sums:
        with self._hooks.deploying(self._algorithm):
            return measure(self._algorithm.deployed())
