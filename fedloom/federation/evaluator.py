"""What is deployed, measured by those who hold data: clients on their own, the server on its own where it has some.

    deployed → each client's sums → pooled loss and score, client by client → what the event says

Sums travel and means are made here (evaluation/means.py). This file does not know when an evaluation is due.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedloom.algorithms.base import Algorithm, Deployed
from fedloom.evaluation import means as measured
from fedloom.federation.hooks.calls import Hooks
from fedloom.federation.record.client_table import Tables
from fedloom.federation.rounds.dispatcher import Sender
from fedloom.messages.types import Cost, Failure

#: Measures a deployed model on data that the server holds: sums, as clients send them (without the loss's where only
#: questions are asked).
ServerMeasure = Callable[[Deployed], Mapping[str, float]]


Sums = Mapping[str, float]


class Evaluations:
    """One run's.

    Args:
        clients: those that an evaluation measures, in order.
        score: whether clients answer questions besides the loss.
        server_measure: for a corpus whose test set the server holds, and for a result that no client holds.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        hooks: Hooks,
        sender: Sender,
        tables: Tables,
        clients: Sequence[str],
        score: bool,
        server_measure: ServerMeasure | None,
    ) -> None:
        self._algorithm, self._hooks, self._sender, self._tables = algorithm, hooks, sender, tables
        self._clients, self._score, self._server_measure = clients, score, server_measure

    def after(self, finished: int, pooled: bool) -> tuple[dict[str, Any], Cost, int]:
        """(loss and score after `finished` rounds as the event has them, what it cost, how many clients failed).

        Personal models differ from client to client, so after the last round each is also measured on everybody's test
        data: the mean of that is what other settings are compared with. Where clients hold an emulator, what they measure
        is that (`emulator`, and `clients`), and the server measures the result on everybody's test data,
        where it has them.

        Args:
            pooled: measure each client's own model on everybody's test data, too.
        """
        started = time.perf_counter()
        own, cost, failures = self.measure(finished, "test", self._clients)
        personal, emulator = self._algorithm.properties.personal, None
        if self._algorithm.properties.offsite:
            emulator = measured.together(own)
            found = measured.means(self._asked(self._server_measure) if self._server_measure else measured.total(()))
        elif pooled:
            sums, spent, failed = self.measure(finished, "pooled", self._clients)
            cost, failures = cost + spent, failures + failed
            found = measured.everywhere(sums)
        else:
            asks = self._server_measure if self._score and not (personal and finished) else None
            found = measured.together(own, self._asked(asks) if asks else None)
        result = {
            **{key: found[key] for key in ("loss", "score", "questions")},
            "tokens": int(sum(m["tokens"] for m in own.values())),
            **self._tables.told(finished, {name: measured.means(m) for name, m in own.items()}),
            "seconds": round(time.perf_counter() - started, 3),
            "pooled": pooled,
            "emulator": emulator,
            "preference": measured.preference(own),
        }
        return result, cost, failures

    def measure(self, finished: int, dataset: str, clients: Sequence[str]) -> tuple[dict[str, Sums], Cost, int]:
        """(client → sums of those that could be measured, what it cost, how many failed)."""
        sums: dict[str, Sums] = {}
        cost, failures = Cost(), 0
        with self._hooks.deploying(self._algorithm):
            for outcome in self._sender.outcomes("evaluate", finished, clients, dataset):
                cost += outcome.cost
                if isinstance(outcome, Failure):
                    self._sender.failed(outcome, "evaluate")
                    failures += 1
                else:
                    sums[outcome.client] = outcome.metrics
        return {c: sums[c] for c in clients if c in sums}, cost, failures

    def _asked(self, measure: ServerMeasure) -> Sums:
        with self._hooks.deploying(self._algorithm):
            return measure(self._algorithm.deployed())
