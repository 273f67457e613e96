"""A recipe's `devices` section: what clients would run on, where a simulation of phones and laptops wants to know.

Numbers only, drawn or read from a file; fedloom/federation/rounds/devices.py makes clients' devices of them.
"""

from __future__ import annotations

from pydantic import Field

from fedloom.recipe.sections import Fraction, Section


class Spread(Section):
    """A log-normal distribution over clients."""

    median: float = Field(gt=0, description="half of the clients have less, half have more")
    spread: float = Field(
        0.0, ge=0, le=5, description="σ of the logarithm; 0 gives all the median, 0.5 two in three within 1.65×"
    )


class DevicesConfig(Section):
    """Each client has one device, drawn once with the seed, or named in `trace`."""

    speed: Spread = Field(
        default_factory=lambda: Spread(median=1e11, spread=0.5),
        description="floating-point operations a second in training",
    )
    download: Spread = Field(
        default_factory=lambda: Spread(median=2.5e6, spread=0.5), description="bytes a second to the client"
    )
    upload: Spread = Field(
        default_factory=lambda: Spread(median=6e5, spread=0.5), description="bytes a second from the client"
    )
    memory: Spread | None = Field(
        None,
        description="bytes for model, adapter and optimiser; a client without room is never sampled; null: all have room",
    )
    available: float = Field(
        1.0, gt=0, le=1, description="the probability that a client can be reached when a round begins"
    )
    dropout: Fraction = Field(0.0, description="the probability that a client vanishes in the middle of its work")
    deadline: float | None = Field(
        None, gt=0, description="virtual seconds that a synchronous round waits for a client; later updates are dropped"
    )
    trace: str | None = Field(
        None,
        description="a .csv file with the column client and any of speed, download, upload, memory, available, dropout: "
        "what it says of a client counts, what it leaves open is drawn",
    )
