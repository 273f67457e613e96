"""What client-level privacy costs: how much longer the noise on the mean is than the longest change a client may make.

    python benchmarks/privacy.py [--epsilon 8] [--delta 1e-5] [--rounds 3]
    python benchmarks/privacy.py --sampling        what sampling is worth, by how it is done (docs/adr/0004-privacy.md)

All clients take part in every round. With the noise multiplier z that keeps (ε, δ) over the rounds, m clients and d trained
numbers, the noise on the mean has a norm of about z·√d/m times the clip C, while the mean of the clipped changes has C at
most. Far above 1 there is nothing to learn from. It prints `clients=… numbers=… ratio=…` for the sizes of docs/privacy.md,
and the ε that is left where the ratio has to be 1. No training: this is arithmetic.
"""

from __future__ import annotations

import argparse
import math

from fedloom.algorithms.privacy.accounting import noise_for, spent

#: What SmolLM2-135M trains with LoRA of rank 8 on all linear layers, and with Fed-SB of rank 8 and of rank 4.
NUMBERS = {"lora, rank 8": 2_442_240, "fed_sb, rank 8": 13_440, "fed_sb, rank 4": 3_360}
CLIENTS = (6, 128, 1_000, 100_000)


def sampling(delta: float) -> None:
    """100 rounds of 10 in 100 clients with noise of one clip: nothing amplified, Poisson, and a fixed number."""
    import dp_accounting as dp
    from dp_accounting import rdp

    print(f"none={spent(1.0, 100, 1.0, delta):.3g} poisson={spent(1.0, 100, 0.1, delta):.3g}", end=" ")
    fixed = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    fixed.compose(dp.SampledWithoutReplacementDpEvent(100, 10, dp.GaussianDpEvent(0.5)), 100)  # a sensitivity of 2C
    print(f"fixed_number={fixed.get_epsilon(delta):.3g}")


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--epsilon", type=float, default=8.0)
    arguments.add_argument("--delta", type=float, default=1e-5)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--sampling", action="store_true")
    chosen = arguments.parse_args()
    if chosen.sampling:
        sampling(chosen.delta)
        return 0
    noise = noise_for(chosen.epsilon, chosen.delta, chosen.rounds, 1.0)
    print(f"epsilon={chosen.epsilon:g} delta={chosen.delta:g} rounds={chosen.rounds} noise={noise:g}")
    for name, numbers in NUMBERS.items():
        for clients in CLIENTS:
            ratio = noise * math.sqrt(numbers) / clients
            even = spent(clients / math.sqrt(numbers), chosen.rounds, 1.0, chosen.delta)
            print(f"{name}: clients={clients} numbers={numbers} ratio={ratio:.3g} epsilon_at_ratio_1={even:.3g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
