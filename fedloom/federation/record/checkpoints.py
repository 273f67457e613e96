"""State that survives a kill: the server's after each round, each client's after each of its own.

A file appears whole or not at all: it is written under a temporary name, flushed to the disk and renamed. Tensors are
safetensors, the rest JSON with a version and the digest of the tensors beside it, so a torn file is recognised and the
one before it used. This file does not know what the state means.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedloom.common.errors import RunFailed, UserError
from fedloom.common.files import folder_name, link_file, write_bytes, write_json
from fedloom.evaluation.means import Means, PreferenceMeans
from fedloom.federation.record.client_table import Clients, Spread
from fedloom.federation.record.events import Stopped
from fedloom.messages.at_rest import VERSION, DamagedFile, decode_state, encode_state, from_bytes, to_bytes
from fedloom.messages.types import Cost, Payload


@dataclass
class RoundState:
    """A server checkpoint: after `round` finished rounds, the algorithm's state and the coordinator's own notes.

    Attributes:
        files: name → where it lies, for files of `to_bytes` that belong to it: `save` takes them in, `load` finds them.
    """

    round: int
    server: Payload
    notes: dict[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation, as events.jsonl and the checkpoints have them (docs/run-folder.md).

    Attributes:
        loss, score, questions: over all clients together.
        tokens: supervised tokens of all clients' own test data.
        clients: client → its own means; empty where they are many, and `spread` is there.
        seconds: wall time.
        pooled: whether `loss` and `score` are means over the clients' personal models.
        emulator: under offsite tuning, what the clients measured of their emulator.
        virtual_seconds: since the start of the run; None where time is real.
    """

    loss: float | None
    score: float | None
    questions: int
    tokens: int
    clients: Clients = field(default_factory=dict)
    spread: Spread | None = None
    seconds: float = 0.0
    pooled: bool = False
    emulator: Means | None = None
    preference: PreferenceMeans | None = None
    virtual_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields of the event `evaluation`, without its round."""
        return dict(self.__dict__)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_json`; also reads a whole event."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


@dataclass
class Progress:
    """The coordinator's own notes, part of every checkpoint.

    Attributes:
        finished: rounds finished.
        cost: of all messages and work, evaluation included.
        evaluation_cost: the part of it that evaluation took.
        evaluations: rounds finished → what was measured then.
        failures, skipped_steps: counted over the run.
        stopped: the round, the hook and the sentence of a run that a hook ended before its last round.
        earlier: (wall, CPU) seconds of the sessions before this one.
    """

    finished: int = 0
    cost: Cost = Cost()
    evaluation_cost: Cost = Cost()
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    failures: int = 0
    skipped_steps: int = 0
    stopped: Stopped | None = None
    earlier: tuple[float, float] = (0.0, 0.0)
    _started: tuple[float, float] = field(
        default_factory=lambda: (time.perf_counter(), time.process_time()), init=False
    )

    def elapsed(self) -> tuple[float, float]:
        """(wall, CPU) seconds of the run so far, all sessions that left a checkpoint together."""
        wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        return self.earlier[0] + wall, self.earlier[1] + cpu

    def notes(self) -> dict[str, Any]:
        return {
            "cost": asdict(self.cost),
            "evaluation_cost": asdict(self.evaluation_cost),
            "evaluations": {str(k): v.to_json() for k, v in self.evaluations.items()},
            "failures": self.failures,
            "skipped_steps": self.skipped_steps,
            "stopped": self.stopped,
            "elapsed": list(self.elapsed()),
        }

    @classmethod
    def from_notes(cls, finished: int, notes: Mapping[str, Any]) -> Progress:
        return cls(
            finished,
            Cost(**notes["cost"]),
            Cost(**notes["evaluation_cost"]),
            {int(k): Evaluation.from_json(v) for k, v in notes["evaluations"].items()},
            notes["failures"],
            notes["skipped_steps"],
            notes["stopped"],
            (notes["elapsed"][0], notes["elapsed"][1]),
        )


class Checkpoints:
    """The server's checkpoints of one run: `checkpoints/round-0003/{server.safetensors,state.json}`, the last `keep`."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def path(self, round: int) -> Path:
        return self.folder / f"round-{round:04d}"

    def rounds(self) -> list[int]:
        """Rounds that have a checkpoint folder, newest first; some may be damaged."""
        found = [re.fullmatch(r"round-(\d+)", p.name) for p in self.folder.glob("round-*")]
        return sorted((int(m.group(1)) for m in found if m), reverse=True)

    def save(self, state: RoundState) -> Path:
        """Write one round's checkpoint whole, then delete all but it and the `keep` - 1 before it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.glob(".round-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        scratch = self.folder / f".round-{state.round:04d}-{os.getpid()}"
        scratch.mkdir()
        try:
            data = to_bytes(state.server)
            for name, path in state.files.items():
                link_file(path, scratch / name)
            write_bytes(scratch / "server.safetensors", data)
            write_json(scratch / "state.json", _described(state, data))
            target = self.path(state.round)
            if target.exists():  # a damaged one that this run passed over and did again
                shutil.rmtree(target)
            os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        ahead = [r for r in self.rounds() if r > state.round]  # damaged ones that were passed over
        older = [r for r in self.rounds() if r <= state.round]
        for gone in ahead + older[self.keep :]:
            shutil.rmtree(self.path(gone), ignore_errors=True)
        return self.path(state.round)

    def amend(self, state: RoundState) -> None:
        """Replace the notes of a round that is already there, such as with its evaluation."""
        data = (self.path(state.round) / "server.safetensors").read_bytes()
        write_json(self.path(state.round) / "state.json", _described(state, data))

    def load(self, round: int) -> RoundState:
        """One round's checkpoint. Raises Damaged, and UserError for one that another version of fedloom wrote."""
        folder = self.path(round)
        try:
            described = json.loads((folder / "state.json").read_text())
            data = (folder / "server.safetensors").read_bytes()
        except (OSError, ValueError) as error:
            raise DamagedFile(f"it cannot be read ({type(error).__name__})") from error
        if not isinstance(described, dict) or described.pop("sha256", None) != _json_digest(described):
            raise DamagedFile("state.json was altered")
        if described["version"] != VERSION:
            raise UserError(
                f"the checkpoints in {self.folder} have version {described['version']}, and this fedloom reads version "
                f"{VERSION}: resume with the fedloom that began the run, or start again with --overwrite"
            )
        if len(data) != described["tensors"]["bytes"]:
            raise DamagedFile(f"server.safetensors has {len(data)} of {described['tensors']['bytes']} bytes")
        if hashlib.sha256(data).hexdigest() != described["tensors"]["sha256"]:
            raise DamagedFile("server.safetensors was altered")
        files = {name: folder / name for name in described["files"]}
        for name, path in files.items():
            try:
                from_bytes(path.read_bytes())
            except (OSError, DamagedFile) as error:
                raise DamagedFile(f"{name} cannot be read") from error
        return RoundState(described["round"], from_bytes(data), described["notes"], files)

    def newest(self) -> tuple[RoundState | None, list[str]]:
        """(the newest checkpoint that is whole, a sentence for each damaged one passed over).

        Raises RunFailed where there are checkpoints and none is whole.
        """
        said: list[str] = []
        rounds = self.rounds()
        for round in rounds:
            try:
                return self.load(round), said
            except DamagedFile as damage:
                said.append(f"the checkpoint of round {round} is damaged: {damage}; using the one before it")
        if rounds:
            raise RunFailed(
                f"no checkpoint in {self.folder} can be read ({said[-1].split(';')[0]}): "
                "start again with --overwrite, or restore the folder from a backup"
            )
        return None, said


def _described(state: RoundState, data: bytes) -> dict[str, Any]:
    described = {
        "version": VERSION,
        "round": state.round,
        "tensors": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        "notes": state.notes,
        "files": sorted(state.files),
    }
    return {**described, "sha256": _json_digest(described)}


def _json_digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Store(Protocol):
    """Stores clients' own state."""

    def save(self, client: str, round: int, state: Mapping[str, Payload]) -> None: ...

    def load(self, client: str, up_to: int) -> dict[str, Payload]: ...


class ClientStore:
    """Stores clients' state between rounds on disk: `clients/<client>/round-0003.safetensors`.

    A server may fall back to any of its checkpoints, so the states of those rounds are kept. With `keep` - 1 checkpoints,
    a client that trains in every round has at most `keep` states, and one that trains rarely has two.
    A client without state has no file, so ten thousand clients of a stateless algorithm cost nothing.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder = folder
        self.keep = keep

    def _folder(self, client: str) -> Path:
        return self.folder / folder_name(client)

    def _rounds(self, client: str) -> list[int]:
        found = [re.fullmatch(r"round-(\d+)\.safetensors", p.name) for p in self._folder(client).glob("round-*")]
        return sorted((int(m.group(1)) for m in found if m), reverse=True)

    def save(self, client: str, round: int, state: Mapping[str, Payload]) -> None:
        """Store `state` (section → payload) of the end of `round`; write nothing if all payloads are empty."""
        data = encode_state(state)
        if data is not None:
            self.put(client, round, data)

    def put(self, client: str, round: int, data: bytes) -> None:
        """Store a state that `encode_state` has encoded."""
        write_bytes(self._folder(client) / f"round-{round:04d}.safetensors", data)
        boundary = round - self.keep + 1  # a fallback never needs a state older than the one after this round
        settled = [r for r in self._rounds(client) if r <= boundary]
        for old in settled[1:]:
            (self._folder(client) / f"round-{old:04d}.safetensors").unlink(missing_ok=True)

    def load(self, client: str, up_to: int) -> dict[str, Payload]:
        """Load section → payload of the newest state of round `up_to` or older; empty if there is none.

        Raises Damaged if the state exists and cannot be read: without it, the run would silently be another one.
        """
        return decode_state(self.get(client, up_to))

    def get(self, client: str, up_to: int) -> bytes | None:
        """Return the bytes that `load` decodes; None if there are none."""
        rounds = [r for r in self._rounds(client) if r <= up_to]
        return (self._folder(client) / f"round-{rounds[0]:04d}.safetensors").read_bytes() if rounds else None
