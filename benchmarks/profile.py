"""Where the time of a round goes, of a whole federation in the simulator, as shares of it.

    python benchmarks/profile.py                         S, 4 clients × 3 rounds × 10 steps: 45 CPU seconds
    python benchmarks/profile.py --model smollm2-135m    M: SmolLM2-135M, 4 clients × 1 round × 4 steps
    python benchmarks/profile.py train.batch_size=1 …    any key of the recipe changed

The places at which the project's parts meet are timed (spans.py), each without what it calls of the others, from the first
round's event `round_started` to the last evaluation's. CPU seconds; `idle` is when this process was not at work: waiting for
the disk, or for whoever else is on the machine. Lines are `NAME_share=` of the wall seconds, `NAME_cpu=` of the CPU seconds:

    forward, backward, optimiser   within a step; optimiser has clipping and the rest of the step too
    setup                          a client's turn: its optimiser, training mode of all modules, its choice of examples
    batches                        examples to one batch
    swap                           a payload into the live adapter, and a client's own state from and to the disk
    encode                         messages both ways: operators, wire format, digests, reading them again
    aggregate                      checking and folding updates
    evaluate                       held-out loss after each round
    checkpoint, events             what is written after a round
    idle                           wall seconds less CPU seconds
    rest                           whatever is none of these, within a client's turn and the aggregation too

and `covered=`, the CPU seconds that have a name over all of them. The exit code is 1 where that is under 0.98. With more
than one thread idle can be negative: one thread unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from spans import main

    sys.exit(main(__doc__))
else:  # cProfile, which torch imports, asks for the standard library's module of this name, and here it finds this file
    import runpy
    import sysconfig
    from pathlib import Path

    globals().update(runpy.run_path(str(Path(sysconfig.get_path("stdlib"), "profile.py")), run_name=__name__))
