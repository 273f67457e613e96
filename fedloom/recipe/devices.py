"""A recipe's `devices` section: the devices of clients in a simulation of phones and laptops.

Numbers only, drawn or read from a file; federation/rounds/devices.py builds the clients' devices from them.
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
    """The clients' devices. Each client has one, drawn once with the seed, or named in `trace`."""

    speed: Spread = Field(
        default_factory=lambda: Spread(median=1e11, spread=0.5),
        description="floating-point operations per second in training",
    )
    download: Spread = Field(
        default_factory=lambda: Spread(median=2.5e6, spread=0.5), description="bytes per second to the client"
    )
    upload: Spread = Field(
        default_factory=lambda: Spread(median=6e5, spread=0.5), description="bytes per second from the client"
    )
    memory: Spread | None = Field(
        None,
        description="bytes for model, adapter and optimiser; a client without room is never sampled; null: no limit",
    )
    available: float = Field(
        1.0, gt=0, le=1, description="the probability that a client is available when a round begins"
    )
    dropout: Fraction = Field(0.0, description="the probability that a client vanishes during its work")
    deadline: float | None = Field(
        None, gt=0, description="virtual seconds that a synchronous round waits for a client; later updates are dropped"
    )
    trace: str | None = Field(
        None,
        description="a .csv file with the column client and any of speed, download, upload, memory, available, dropout: "
        "values in the file are used; missing ones are drawn",
    )
