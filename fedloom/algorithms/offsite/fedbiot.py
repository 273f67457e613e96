"""FedBiOT: FedOT that aligns the emulator again after every round, and keeps clients near the broadcast by a penalty.

Wu et al., "FedBiOT: LLM Local Fine-tuning in Federated Learning without Full Model", arXiv 2406.17706, a bi-level problem:

    lower level   server: the emulator E follows the full middle M on public data, with the round's adapter A in both:
                  relative squared error of the hidden states + λ · KL(full ‖ emulator)
    upper level   client: min_A  loss(A ∘ E) + μ/2 ‖A − A_t‖², A_t the round's broadcast

Both terms follow the code that the paper's authors published, where the clients' term has no ½; this file does not cite
the paper's equation numbers. The changed emulator travels to each client with its next message, and is part of the
server's state. The defaults of λ and μ are not from the paper.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedloom.algorithms import base
from fedloom.algorithms.about import About
from fedloom.algorithms.offsite import fedot
from fedloom.algorithms.offsite.alignment import AlignOptions
from fedloom.common.errors import UserError


class BiLevelOptions(AlignOptions):
    kl: float = Field(1.0, ge=0, description="λ of the next token's KL term")


class FedBiOT(fedot.FedOT):
    properties: ClassVar = base.Properties(
        linear_sum=True,
        methods=frozenset({"full", "lora"}),
        neutral={"mu": 0.0, "drop": 0.0},
        offsite=True,
        weights=True,
        cohorts=False,
    )
    about: ClassVar = About(
        "offsite",
        "outer layers; emulator too",
        "Wu et al. 2024, arXiv 2406.17706",
        up=lambda s: s.outer,
        down=lambda s: s.outer + s.emulator,
        server=lambda s: s.outer + s.emulator,
    )

    class Options(fedot.FedOT.Options):
        mu: float = Field(0.01, ge=0, description="μ: how strongly a client stays near the broadcast")
        align: BiLevelOptions | None = Field(
            None,
            description="public data for aligning the emulator, before round 1 and after each: {corpus:} or {path:} …",
        )

    options: Options

    def _check_options(self) -> None:
        super()._check_options()
        if self.options.align is None:
            raise UserError(
                "fedbiot aligns its emulator on public data, but the recipe names none: set algorithm.align.corpus or "
                "algorithm.align.path, or use fedot"
            )

    def server_step(self) -> None:
        self._distil_once()
        self._align()
