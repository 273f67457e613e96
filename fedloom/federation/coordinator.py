"""The only round loop in the project, the same for every runtime and every algorithm.

    before the first round, after every k-th and after the last: evaluate
    each round: sample clients → send → collect updates → aggregate → server step → checkpoint

The `UpdateSource` decides who gets work and which updates make a round: all sampled clients behind one barrier
(federation/rounds/synchronous.py), or those that have come back of clients that are always at work
(federation/rounds/asynchronous.py).

A round is finished once its checkpoint is on disk; whatever kills the process after that costs nothing of it. The
coordinator does not know where clients run nor what is in a payload.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedloom.algorithms.base import Algorithm
from fedloom.evaluation.means import pooled_mean
from fedloom.federation.evaluator import Evaluator
from fedloom.federation.hooks.base import ServerRound
from fedloom.federation.hooks.calls import SECTION, Hooks
from fedloom.federation.record.checkpoints import Checkpoints, Progress, RoundState
from fedloom.federation.record.events import Events
from fedloom.federation.rounds.collection import UpdateSource
from fedloom.federation.rounds.dispatcher import Dispatcher
from fedloom.messages.names import prefixed
from fedloom.messages.types import Cost, Failure, Outcome, Payload, Update

#: What the hooks kept, in the server's state.
HOOKS = f"{SECTION}/"


@dataclass(frozen=True)
class Record:
    """What a run writes: the state after each round, and its events."""

    checkpoints: Checkpoints
    events: Events


class Coordinator:
    """Runs rounds until the recipe's last. It is given its parts, which experiment/run.py makes.

    Args:
        dispatcher: sends work to clients; the runtime is behind it.
        source: where a round's updates come from.
        evaluator: measures what is deployed.
        hooks: the server's, where the recipe names any.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        dispatcher: Dispatcher,
        source: UpdateSource,
        evaluator: Evaluator,
        record: Record,
        hooks: Hooks | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.dispatcher = dispatcher
        self.source = source
        self.evaluator = evaluator
        self.checkpoints, self.events = record.checkpoints, record.events
        self.hooks = hooks or None
        self.rounds = dispatcher.terms.rounds
        self.progress = Progress()

    def close(self) -> None:
        """Close the runtime. A second call does nothing."""
        self.dispatcher.runtime.close()

    def resume(self, state: RoundState, lost: int = 0) -> None:
        """Resume from a checkpoint. Clients get the recipe and the initial payload again.

        Args:
            lost: rounds that were finished after this checkpoint and are done again.
        """
        self.algorithm.load_server_state(Payload(state.server.without(HOOKS), state.server.meta))
        if self.hooks is not None:
            self.hooks.load(Payload(state.server.under(HOOKS), state.notes.get(SECTION, {})))
        self.progress = Progress.from_notes(state.round, state.notes)
        if self.dispatcher.channel is not None:
            self.dispatcher.channel.load_notes(state.notes["channel"])
        self.source.load(state.notes["gathering"], state.files)
        if self.algorithm.repeated(lost):
            self._checkpoint()

    def run(self) -> Progress:
        """All rounds that are left. Raises RunFailed below quorum; every finished round is on disk then."""
        if self.progress.finished == 0 and not self.checkpoints.rounds():
            self._checkpoint()  # so that an interrupted first evaluation or round leaves something to resume
        while True:
            finished = self.progress.finished
            over = self._over(finished)
            if (over or self.evaluator.due(finished)) and not self._evaluated(finished):
                self._evaluate(finished)
                self.checkpoints.amend(self._state())
            if over:
                self.source.close()
                if self.hooks is not None:
                    self.hooks.deploy(self.algorithm)
                return self.progress
            self.round(finished + 1)

    def _over(self, finished: int) -> bool:
        return finished >= self.rounds or self.progress.stopped is not None

    def _evaluated(self, finished: int) -> bool:
        """Whether this evaluation is there; one in the middle of a longer run is no final one of personal models."""
        done = self.progress.evaluations.get(finished)
        return done is not None and (done.pooled or not self._final_personal(finished))

    def _final_personal(self, finished: int) -> bool:
        """Whether each client's own model is now measured on everybody's test data."""
        return self._over(finished) and self.evaluator.pools

    def save_personal(self) -> dict[str, str]:
        """Have every testing client write its own adapter; returns client → sha256 of it."""
        digests, cost = self.evaluator.save_personal(self.progress.finished)
        self._measured(cost, 0)  # as the evaluation of personal models, which asks for the same
        return digests

    # ------------------------------------------------------------------ one round

    def round(self, number: int) -> None:
        """Do round `number` (from 1): collect updates, aggregate, write the checkpoint. Raises RunFailed below quorum."""
        started = time.perf_counter()
        tally = _Tally()
        at = ServerRound(number, self.rounds, self.algorithm)
        if self.hooks is not None:
            self.hooks.round_start(at)
        self.events.write("round_started", round=number, clients=self.source.begin(number))
        updates = self.source.updates(lambda outcome: self._accepted(outcome, number, tally))
        metrics = dict(self.algorithm.aggregate(updates))
        if self.source.now is not None:
            metrics["virtual_seconds"] = self.source.now
        self.algorithm.server_step()
        stopped_by = "" if self.hooks is None else self._hooks_after(at, self.hooks)
        self.progress.finished = number
        self.progress.cost += tally.cost
        self.progress.failures += tally.failures
        self.progress.skipped_steps += tally.skipped_steps
        # First the event, then the checkpoint: a kill between the two voids the event (`tracking.read_events`), while
        # the other order would lose it.
        self.events.write(
            "round_finished",
            round=number,
            updates=tally.updates,
            failures=tally.failures,
            loss=tally.loss / tally.examples if tally.examples else None,
            upload_bytes=tally.cost.upload_bytes,
            download_bytes=tally.cost.download_bytes,
            seconds=round(time.perf_counter() - started, 3),
            metrics={**metrics, **tally.told(), **({} if self.hooks is None else self.hooks.numbers())},
        )
        if stopped_by:
            self.progress.stopped = {"round": number, "hook": stopped_by, "reason": at.stop}
            self.events.write("run_stopped", **self.progress.stopped)
        self.events.write("checkpoint", round=number, path=self._checkpoint().name)

    def _hooks_after(self, at: ServerRound, hooks: Hooks) -> str:
        """The server's hooks once a round is aggregated; the name of the one that ends the run, or the empty string."""
        hooks.call("aggregated", at)
        if hooks.validates(at.number):
            at.validation, cost, failures = self.evaluator.validate(at.number)
            self._measured(cost, failures)
        return hooks.stopped_by(at)

    def _accepted(self, outcome: Outcome, number: int, tally: _Tally) -> Update | None:
        """The update where it may be aggregated, and its event; None for a failure or a refused update, and theirs."""
        tally.cost += outcome.cost
        refused = self._refused(outcome)
        if refused is not None:
            tally.failures += 1
            self.dispatcher.failed(replace(refused, round=number), "train")  # the round that it is missing from
            return None
        assert isinstance(outcome, Update)
        skipped = int(outcome.metrics.get("skipped_steps", 0))
        tally.updates += 1
        tally.skipped_steps += skipped
        own = {k: v for k, v in outcome.metrics.items() if "/" in k}  # those of the client's hooks
        tally.numbers.append((own, outcome.num_examples))
        tally.loss += outcome.metrics["loss"] * outcome.num_examples
        tally.examples += outcome.num_examples
        self.events.write(
            "client_update",
            round=number,
            client=outcome.client,
            examples=outcome.num_examples,
            tokens=outcome.cost.train_tokens,
            steps=outcome.cost.steps,
            skipped_steps=skipped,
            loss=outcome.metrics["loss"],
            upload_bytes=outcome.cost.upload_bytes,
            download_bytes=outcome.cost.download_bytes,
            broadcast_bytes=outcome.cost.broadcast_bytes,
            seconds=round(outcome.cost.wall_seconds, 3),
            metrics=own,
            **self.source.about(outcome),
        )
        return outcome

    def _refused(self, outcome: Outcome) -> Failure | None:
        if isinstance(outcome, Failure):
            return outcome
        try:
            self.algorithm.accept(outcome)
        except ValueError as error:
            return Failure(outcome.client, outcome.round, "bad_payload", str(error))
        return None

    # ------------------------------------------------------------------ evaluation

    def _evaluate(self, finished: int) -> None:
        result, cost, failures = self.evaluator.after(finished, self._final_personal(finished))
        result = replace(result, virtual_seconds=self.source.now)
        self._measured(cost, failures)
        self.progress.evaluations[finished] = result
        self.events.write("evaluation", round=finished, **result.to_json())

    def _measured(self, cost: Cost, failures: int) -> None:
        self.progress.cost += cost
        self.progress.evaluation_cost += cost
        self.progress.failures += failures

    # ------------------------------------------------------------------ checkpoints

    def _state(self) -> RoundState:
        channel = self.dispatcher.channel
        notes = {
            **self.progress.notes(),
            "channel": {} if channel is None else channel.notes(),
            "gathering": self.source.notes(),
        }
        server = self.algorithm.server_state()
        if self.hooks is not None:
            kept = self.hooks.state()
            server = Payload({**server.tensors, **prefixed(kept.tensors, HOOKS)}, server.meta)
            notes[SECTION] = kept.meta
        return RoundState(self.progress.finished, server, notes, self.source.files())

    def _checkpoint(self) -> Path:
        return self.checkpoints.save(self._state())


@dataclass
class _Tally:
    """What one round's outcomes add up to."""

    updates: int = 0
    failures: int = 0
    skipped_steps: int = 0
    cost: Cost = Cost()
    loss: float = 0.0  # each client's mean loss, times its examples
    examples: int = 0
    numbers: list[tuple[Mapping[str, float], int]] = field(default_factory=list)

    def told(self) -> dict[str, float]:
        """What clients' hooks told: number → the mean over those that told it, weighted by their examples."""
        names = dict.fromkeys(name for own, _ in self.numbers for name in own)
        pairs = {name: [(own[name] * n, n) for own, n in self.numbers if name in own] for name in names}
        return {name: mean for name, values in pairs.items() if (mean := pooled_mean(values)) is not None}
