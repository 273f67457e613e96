"""The types of summary.json. docs/run-folder.md explains each key; a test compares these types with a run's file.

A summary stays plain JSON values: users read it by key from Python too. Folders of older releases may lack keys that were
added later, so readers of such folders use `get` for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, cast

from fedloom.federation.record.events import Stopped
from fedloom.federation.record.run_folder import RunFolder


class Pair(TypedDict):
    """A number before and after training; None if it was not measured."""

    before: float | None
    after: float | None


class WorstClient(Pair):
    client: str


class LossSummary(Pair):
    worst_client: WorstClient | None


class ScoreSummary(LossSummary):
    suite: str | None
    questions: int
    note: str


class PreferenceSummary(TypedDict):
    accuracy: Pair
    loss: Pair
    margin: Pair
    pairs: int


class Scored(TypedDict):
    loss: float | None
    score: float | None


class LeftServer(TypedDict):
    """What each client got of the model, and the whole model."""

    parameters: int
    parameters_of_model: int
    bytes: int
    bytes_of_model: int
    share_of_parameters: float
    share_of_bytes: float


class OffsiteSummary(TypedDict):
    full_zero_shot: Scored
    emulator_zero_shot: Scored
    emulator_tuned: Scored
    plug_in: Scored
    full_tuned: Scored | None
    note: str
    left_server: LeftServer


class VirtualSummary(TypedDict):
    """Virtual seconds of the run, and [virtual seconds, loss] of each evaluation."""

    seconds: float
    loss: list[list[float | None]]


class CostSummary(TypedDict):
    """Bytes, tokens, operations and seconds of the whole run, and the part of them that evaluation took."""

    upload_bytes: int
    download_bytes: int
    broadcast_bytes: int
    train_tokens: int
    train_flops: int
    steps: int
    wall_seconds: float
    cpu_seconds: float
    gpu_seconds: float
    evaluation_upload_bytes: int
    evaluation_download_bytes: int
    evaluation_broadcast_bytes: int
    evaluation_seconds: float
    client_cpu_seconds: float
    peak_memory_bytes: int | None
    gpu_utilisation: float | None


class DataSummary(TypedDict):
    examples: int
    train: int
    validation: int
    test: int
    dropped: dict[str, int]
    truncated: int
    truncated_tokens: int
    max_length: int


class ClientSummary(TypedDict):
    train: int
    test: int
    loss: Pair
    score: Pair


class BaseSummary(TypedDict):
    dtype: str
    quantization: str | None


class AdapterSummary(TypedDict):
    method: str
    parameters: int
    bytes: int


class Summary(TypedDict):
    """The content of summary.json."""

    name: str
    description: str
    algorithm: str
    corpus: str
    corpus_license: str
    corpus_source: str
    model: str
    base: BaseSummary
    adapter: AdapterSummary
    score: ScoreSummary
    loss: LossSummary
    preference: PreferenceSummary | None
    privacy: Mapping[str, Any] | None
    offsite: OffsiteSummary | None
    virtual: VirtualSummary | None
    cost: CostSummary
    clients: int
    rounds: int
    stopped: Stopped | None
    seed: int
    failures: int
    skipped_steps: int
    data: DataSummary
    per_client: dict[str, ClientSummary]
    adapter_sha256: str
    versions: Mapping[str, Any]
    environment: Mapping[str, Any]
    git: str | None
    finished: str


def read_summary(folder: RunFolder) -> Summary | None:
    """Read a run's summary.json; None if it is not there, as before the end of a run, or cannot be read."""
    return cast(Summary | None, folder.read("summary.json"))
