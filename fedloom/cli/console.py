"""Terminal output of a run: progress while it works, and tables at its end. This file only formats."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedloom.common.logs import heard_by
from fedloom.data.heterogeneity import describe_difference

if TYPE_CHECKING:
    from fedloom.data.splitters import SplitTable
    from fedloom.experiment.evaluate import ClientEvaluation, ModelEvaluation, SuiteEvaluation
    from fedloom.federation.watch import Watch
    from fedloom.reporting.summary_types import OffsiteSummary, Summary

#: The most clients in a table; the others are one row of sums.
MANY_CLIENTS = 24


class Display:
    """Shows progress: bars on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._rounds = 0
        self._started = time.monotonic()
        self._bars = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )
        self._run = self._bars.add_task("rounds", total=None, visible=False)
        self._step = self._bars.add_task("clients", total=None, visible=False)

    def __enter__(self) -> Display:
        self._bars.start()
        self._hearing = heard_by(self.say)
        self._hearing.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hearing.__exit__(kind, error, at)
        self._bars.stop()

    def watch(self) -> Watch:
        from fedloom.federation.watch import Watch

        return Watch(event=self.event, tick=self.tick)

    def say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(f"{self._clock()} {text}", markup=False)

    def tick(self, what: str, round: int, done: int, total: int) -> None:
        label = f"round {round}: clients train" if what == "train" else f"after round {round}: evaluation"
        if what == "evaluate" and round == 0:
            label = "before training: evaluation"
        self._bars.update(self._step, description=label, completed=done, total=total, visible=True)
        if done == 0:
            self._bars.reset(self._step, description=label, total=total, visible=True)

    def event(self, event: Mapping[str, Any]) -> None:
        """Print one line for each round, evaluation and failure."""
        kind = event["event"]
        if kind in {"run_started", "run_resumed"}:
            self._rounds = event["rounds"]
            done = event.get("round", 0)
            self._bars.update(self._run, total=self._rounds, completed=done, visible=True)
            self.say(_headline(event))
        elif kind == "round_finished":
            self._bars.update(self._run, completed=event["round"])
            self.say(
                f"round {event['round']}/{self._rounds}  training loss {_number(event['loss'])}  "
                f"{event['updates']} updates"
                + (f", {event['failures']} failed" if event["failures"] else "")
                + _asynchronous(event["metrics"])
                + _spent(event["metrics"])
                + f"  up {size(event['upload_bytes'])}  down {size(event['download_bytes'])}  {event['seconds']:.0f} s"
            )
        elif kind == "evaluation":
            score = "" if event["score"] is None else f"  score {event['score']:.3f} of {event['questions']} questions"
            when = "before training" if event["round"] == 0 else f"after round {event['round']}"
            preference = event["preference"]
            won = (
                "" if preference is None else f"  preferred {preference['accuracy']:.3f} of {preference['pairs']} pairs"
            )
            self.say(f"{when}  held-out loss {_number(event['loss'])}{score}{won}")
        elif kind == "client_failed":
            self.say(f"round {event['round']}: client {event['client']} failed ({event['reason']}): {event['detail']}")

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self._started)
        return f"{seconds // 60:3d}:{seconds % 60:02d}"


def _headline(event: Mapping[str, Any]) -> str:
    if event["event"] == "run_resumed":
        return f"resumed after round {event['round']} of {event['rounds']}"
    return (
        f"{event['name']}: {event['algorithm']} on {event['corpus']}, {event['clients']} clients, {event['model']}, "
        f"{event['parameters']:,} trainable parameters, {event['rounds']} rounds"
    )


def _asynchronous(metrics: Mapping[str, float]) -> str:
    """Format the age of a round's updates and its end in virtual time; empty without them."""
    age = f", {metrics['staleness']:.1f} versions old" if "staleness" in metrics else ""
    return age + (f", at {metrics['virtual_seconds']:.1f} virtual s" if "virtual_seconds" in metrics else "")


def _spent(metrics: Mapping[str, Any]) -> str:
    """Format (ε, δ) so far of a private run; empty for others."""
    if "epsilon" not in metrics:
        return ""
    return f"  ε {metrics['epsilon']:.3g} (δ {metrics['delta']:.1g})"


def result_table(summary: Summary) -> Table:
    """Build the table of a run's main results."""
    table = Table("", "before", "after", box=None, pad_edge=False)
    loss, score, cost = summary["loss"], summary["score"], summary["cost"]
    if score["after"] is not None:
        table.add_row(f"score ({score['questions']} questions)", f"{score['before']:.3f}", f"{score['after']:.3f}")
        if worst := score["worst_client"]:
            table.add_row(f"  worst client, {worst['client']}", _number(worst["before"], 3), _number(worst["after"], 3))
    else:
        table.add_row("score", "none", summary["score"]["note"])
    if preference := summary.get("preference"):
        won = f"preferred answers ({preference['pairs']} pairs)"
        for name, value in ((won, preference["accuracy"]), ("preference loss", preference["loss"])):
            table.add_row(name, _number(value["before"], 3), _number(value["after"], 3))
    table.add_row("held-out loss", _number(loss["before"]), _number(loss["after"]))
    if worst := loss["worst_client"]:
        table.add_row(f"  worst client, {worst['client']}", _number(worst["before"]), _number(worst["after"]))
    if (privacy := summary["privacy"]) and privacy["epsilon"] is not None:
        table.add_row("privacy spent: ε, δ", f"{privacy['epsilon']:.3g}", f"{privacy['delta']:.1g}")
    if offsite := summary.get("offsite"):
        _offsite_rows(table, offsite)
    table.add_row("bytes up, down", size(cost["upload_bytes"]), size(cost["download_bytes"]))
    table.add_row("training tokens, steps", f"{cost['train_tokens']:,}", f"{cost['steps']:,}")
    table.add_row("seconds, wall and CPU", f"{cost['wall_seconds']:.0f}", f"{cost['cpu_seconds']:.0f}")
    if summary["failures"]:
        table.add_row("client failures", "", str(summary["failures"]))
    return table


def _offsite_rows(table: Table, offsite: OffsiteSummary) -> None:
    """Add three of offsite tuning's five losses (the other two are the run's own, above), and what left the server."""
    emulator = [_number(offsite[name]["loss"]) for name in ("emulator_zero_shot", "emulator_tuned")]
    tuned = offsite["full_tuned"]
    table.add_row("  of the emulator, as clients have it", *emulator)
    table.add_row("  of the same layers tuned in the full model", "", _number(tuned["loss"] if tuned else None))
    left = offsite["left_server"]
    table.add_row(
        "left the server", f"{left['share_of_parameters']:.1%} of parameters", f"{left['share_of_bytes']:.1%} of bytes"
    )


def split_rows(described: SplitTable) -> Table:
    """Build the table of clients with their sizes and largest categories."""
    table = Table("client", "train", "validation", "test", "categories", box=None, pad_edge=False)
    clients = described["clients"]
    for row in clients[:MANY_CLIENTS]:
        largest = sorted(row["categories"].items(), key=lambda item: (-item[1], item[0]))
        text = ", ".join(f"{name or '(none)'} {count}" for name, count in largest[:5])
        more = f", {len(largest) - 5} more" if len(largest) > 5 else ""
        table.add_row(row["client"], str(row["train"]), str(row["validation"]), str(row["test"]), text + more)
    rest = clients[MANY_CLIENTS:]
    if rest:
        sums = [str(sum(row[k] for row in rest)) for k in ("train", "validation", "test")]
        table.add_row(f"{len(rest)} more clients", *sums, "")
    total = [str(sum(row[k] for row in clients)) for k in ("train", "validation", "test")]
    table.add_row("all", *total, f"{len(described['categories'])} categories, splitter {described['splitter']}")
    table.caption = describe_difference(described.get("heterogeneity"))
    if repeated := described.get("test_questions_trained_on"):
        table.caption += f"\n{repeated:,} test questions are in a training set too: the corpus repeats itself"
    return table


def evaluation_table(measured: ModelEvaluation) -> Table:
    """Build the table of loss and score, over all clients and for each."""
    table = Table("", "held-out loss", "score", "questions", box=None, pad_edge=False)
    rows: dict[str, ClientEvaluation] = {"all": measured, **measured["clients"]}
    for name, values in list(rows.items())[: MANY_CLIENTS + 1]:
        table.add_row(name, _number(values["loss"]), _number(values["score"], 3), str(values["questions"]))
    if pairs := measured["preference"]:
        table.caption = (
            f"preferred answers {_number(pairs['accuracy'], 3)} of {pairs['pairs']} pairs, "
            f"preference loss {_number(pairs['loss'])}, margin {_number(pairs['margin'])}"
        )
    return table


def suite_table(measured: SuiteEvaluation) -> Table:
    """Build the table of a suite's tasks and metrics, with the evaluation score below."""
    table = Table("task", "measure", "score", "±", "questions", "shots", box=None, pad_edge=False)
    for name, task in measured["tasks"].items():
        first = task["metric"]
        for metric in (first, *(m for m in task["metrics"] if m != first)):
            head = (name, str(task["questions"]), str(task["shots"])) if metric == first else ("", "", "")
            value, error = task["metrics"][metric], task["stderr"].get(metric)
            mark = "*" if metric == first else ""
            table.add_row(head[0], f"{metric}{mark}", _number(value), _number(error, 3), head[1], head[2])
    for name in measured["left_out"]:
        table.add_row(name, "left out", "", "", "", "")
    part = "" if measured["complete"] else f" over {len(measured['tasks'])} tasks, {len(measured['left_out'])} left out"
    table.caption = f"evaluation score {measured['score']:.4f}{part}: {measured['note']} (* counts for the score)"
    return table


def size(count: float) -> str:
    """Format bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _number(value: float | None, digits: int = 4) -> str:
    return "none" if value is None else f"{value:.{digits}f}"
