"""The same job by fedloom, by Flower's simulation, by a bare loop, and with a process for each client: CPU time of each.

    python benchmarks/peers.py --install          once: Flower 1.41 into a virtual environment of its own (1.6 GB)
    python benchmarks/peers.py                    4 CPU minutes and more
    python benchmarks/peers.py --steps 100        a longer job, in which loading counts less
    python benchmarks/peers.py --words 3 9        examples of twice the length
    python benchmarks/peers.py --ways fedloom bare processes     where PyPI cannot be reached

The job: S, a Llama of 7.6M parameters, LoRA of rank 8 on all linear layers, FedAvg, 4 clients × 3 rounds × 10 steps of 4
examples of some 30 tokens, AdamW afresh in each round, clipped; the same token ids in the same steps from the same adapter.
Each way is a command of its own, from the start of its interpreter to the end of its last process, on one thread for each:

    fedloom     `python -m fedloom run RECIPE`, report and all
    flower      Flower's simulation engine; its client loads the model and the adapter for each message, as its template for
                language models does (flower_app.py). Its training loop is that of `bare`, which is less than the template's
    bare        one process, one model, transformers and peft, adapters in and out by peft's functions (peer_job.py)
    processes   the same with a process for each client and round

    tokens_per_example=         the mean, without padding
    NAME_cpu_seconds=           user and system time of all its processes, looked at ten times a second: the last tenth of a
                                second of each process is lost, least of fedloom's one and most of the peers' many
    flower_cpu_ratio=           flower over fedloom; process_per_client_ratio=, bare_ratio= likewise
    NAME_loss=                  of the adapter that it ends with, on the first round's batches, measured in one process
    loss_before=                of the adapter that all start from
    loss_difference=            between the highest and the lowest of the final losses, over their fall

Where `--repeats` is over 1, ways take turns and seconds are medians. The exit code is 1 where flower_cpu_ratio is under 2.0,
process_per_client_ratio under 4.0, or loss_difference over 0.01: then it was not the same job.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
import venv
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pairs import load
from small import recipe_values, small_model
from worded import worded_rows

from fedloom import Recipe
from fedloom.common import cache_folder
from fedloom.common.yaml import dump_yaml
from fedloom.data.batching import Plan, round_indices
from fedloom.experiment.prepare import prepare
from fedloom.federation.watch import Watch

HERE = Path(__file__).resolve().parent
CLIENTS, ROUNDS, BATCH, WORDS = 4, 3, 4, (1, 4)
WAYS = ("fedloom", "flower", "bare", "processes")

#: Ratio → (whose seconds over fedloom's, how much they have to be at least).
RATIOS = {
    "flower_cpu_ratio": ("flower", 2.0),
    "process_per_client_ratio": ("processes", 4.0),
    "bare_ratio": ("bare", 0.0),
}
PACKAGES = ("flwr[simulation]==1.41.0", "torch", "transformers", "peft", "safetensors")


def flower_home() -> Path:
    return cache_folder.cache_home() / "benchmarks" / "flwr-1.41.0"


def install(folder: Path) -> None:
    """Flower, and this project's versions of what trains."""
    venv.create(folder, with_pip=True, clear=True)
    pins = dict(line.split("==") for line in (HERE.parent / "constraints.txt").read_text().split() if "==" in line)
    packages = [f"{p}=={pins[p]}" if p in pins else p for p in PACKAGES]
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages], check=True)


# ------------------------------------------------------------------ CPU time of a command with all that it starts


def marked(mark: str, known: dict[int, bool]) -> list[int]:
    """Processes whose environment has `mark`; `known` remembers whose has been read."""
    found = []
    for pid in (int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()):
        try:
            if not known.get(pid):
                known[pid] = mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if known[pid]:
            found.append(pid)
    return found


def spent(pid: int) -> float | None:
    """User and system seconds of a process so far; None once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_of(command: Sequence[str], environment: dict[str, str]) -> float:
    """Seconds of `command` and of whatever it starts, daemons too, until none of them is left.

    Raises RuntimeError with the end of what it said where it fails.
    """
    mark = uuid.uuid4().hex
    seconds: dict[int, float] = {}
    known: dict[int, bool] = {os.getpid(): False}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, env={**os.environ, **environment, "FEDLOOM_PEER_MARK": mark}, stdout=said, stderr=said
        )
        try:
            while process.poll() is None or marked(mark, known):
                for pid in marked(mark, known):
                    seconds[pid] = spent(pid) or seconds.get(pid, 0.0)
                time.sleep(0.1)
        finally:
            for pid in marked(mark, known):  # only where this was interrupted
                os.kill(pid, signal.SIGKILL)
        if process.returncode:
            said.seek(0)
            end = said.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {end}")
    return sum(seconds.values())


# ------------------------------------------------------------------ the job


def write_job(folder: Path, steps: int, words: tuple[int, int]) -> float:
    """The recipe, and the same as lists of token ids for those who read no recipe; returns tokens in an example."""
    model = small_model(folder / "model")
    rows = worded_rows(folder / "rows.jsonl", CLIENTS * BATCH * steps, words)
    train = {"steps": steps, "batch_size": BATCH, "lr": 1e-3, "schedule": "constant"}
    values = recipe_values(model, rows, CLIENTS) | {"train": train, "federation": {"rounds": ROUNDS}}
    recipe = Recipe.parse(values, {"data.max_length": 192})
    (folder / "recipe.yaml").write_text(dump_yaml(recipe.resolved()))
    setting = prepare(recipe, Watch())
    plan, data = Plan(BATCH, 1, steps, None), setting.data
    assert len({len(data.client(c).train) for c in setting.schedule.training}) == 1, "clients have to weigh the same"

    def sequences(examples: Sequence[int]) -> list[tuple[list[int], int]]:
        return [(data.sequences[i].ids.tolist(), data.sequences[i].prompt) for i in examples]

    rounds = [
        [
            [sequences(step[0]) for step in round_indices(data.client(c).train, plan, round, recipe.seed, c)]
            for c in setting.schedule.training
        ]
        for round in range(1, ROUNDS + 1)
    ]
    about = {"model": str(model), "pad": 3, "lr": train["lr"], "betas": [0.9, 0.99], "eps": 1e-8, "clip": 1.0}
    (folder / "job.json").write_text(json.dumps(about | {"rounds": rounds}))
    from safetensors.torch import save_file

    save_file(setting.model.initial_adapter().tensors(), folder / "initial.safetensors")
    seen = [len(ids) for clients in rounds for steps in clients for step in steps for ids, _ in step]
    return statistics.fmean(seen)


def ways(folder: Path, flower: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Name → (command, what its environment has besides)."""
    job = str(HERE / "peer_job.py")
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "FEDLOOM_PEER_JOB": str(folder)}
    return {
        "fedloom": ([sys.executable, *f"-m fedloom run {folder}/recipe.yaml --overwrite --out {folder}/run".split()], {}),
        "bare": ([sys.executable, job, "bare", str(folder)], {}),
        "processes": ([sys.executable, job, "processes", str(folder)], {}),
        "flower": (
            [str(flower / "bin" / "python"), str(HERE / "flower_app.py")],
            quiet | {"PYTHONPATH": str(HERE), "HOME": str(folder)},
        ),
    }  # fmt: skip


def losses(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """Of the adapter that each way left, and of the one that all start from."""
    from peer_job import Job
    from safetensors.torch import load_file

    job = Job(folder)
    model = job.model()
    files = {n: folder / f"{n}.safetensors" for n in names} | {"before": folder / "initial.safetensors"}
    if "fedloom" in names:
        files["fedloom"] = folder / "run" / "adapter" / "adapter_model.safetensors"
    return {name: job.loss(model, load_file(path)) for name, path in files.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--words", type=int, nargs=2, default=WORDS, metavar=("LEAST", "MOST"), help="of an example; S spells them out"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--flower", type=Path, default=flower_home(), help="a virtual environment with flwr")
    parser.add_argument("--install", action="store_true", help="make that environment first")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    arguments = parser.parse_args()
    if arguments.install:
        install(arguments.flower)
    if "flower" in arguments.ways and not (arguments.flower / "bin" / "python").exists():
        print(
            f"there is no Flower in {arguments.flower}: --install puts it there, --ways can leave it out",
            file=sys.stderr,
        )
        return 2
    print(load(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"tokens_per_example={write_job(folder, arguments.steps, tuple(arguments.words)):.0f}", flush=True)
        commands = {name: way for name, way in ways(folder, arguments.flower).items() if name in arguments.ways}
        seconds: dict[str, list[float]] = {way: [] for way in commands}
        for turn in range(arguments.repeats):
            for way in commands if turn % 2 == 0 else reversed(commands):
                seconds[way].append(cpu_of(*commands[way]))
                print(f"{way}_cpu_seconds={seconds[way][-1]:.1f}", flush=True)
        found = losses(folder, list(commands))
    cpu = {way: statistics.median(own) for way, own in seconds.items()}
    ratios = {n: cpu[way] / cpu["fedloom"] for n, (way, _) in RATIOS.items() if {way, "fedloom"} <= set(cpu)}
    for way, loss in found.items():
        print(f"{'loss_before' if way == 'before' else f'{way}_loss'}={loss:.5f}")
    ends = [found[way] for way in commands]
    apart = (max(ends) - min(ends)) / abs(found["before"] - statistics.median(ends))
    print(f"loss_difference={apart:.1e}")
    for name, value in ratios.items():
        print(f"{name}={value:.2f}")
    print(load())
    missed = [n for n, value in ratios.items() if value < RATIOS[n][1]]
    missed += ["loss_difference"] if apart > 0.01 else []
    for name in missed:
        print(f"missed: {name}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
