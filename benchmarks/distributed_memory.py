"""A hundred rounds of 10 MB updates between a server and three sites: whether the server's memory grows, and what is left.

    python benchmarks/distributed_memory.py [--rounds 100]      6 to 14 minutes on two busy cores

The real commands on loopback (`provision`, three `join`, `serve`). The model is a random Llama of 2.6 million weights that
is trained whole, so that an update is 10 MB; a round is one step on one short example: next to nothing but messages. Memory
is the resident size of the engine's service and of the job that holds our run, together, five times a second. Lines:

    rounds=  update_bytes=  seconds_a_round=
    early_mb=    median over rounds 21 to 40
    late_mb=     median over rounds 81 to 100 (of 100; the last fifth)
    growth=      late / early, at most 1.2
    service_mb=  job_mb=    the two processes, early and late
    folders_left=   folders of jobs in the kits, and whatever is new in the temporary folder

The exit code is 1 where growth is over 1.2, late_mb over 1000, or a folder is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedloom.recipe.recipe import Recipe

import psutil  # isort: skip
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedloom.common.yaml import dump_yaml
from fedloom.experiment.local_sites import free_port
from fedloom.federation.record.events import read_events

SITES = ("north", "south", "west")
JOB = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--keep", type=Path, help="a new folder for everything, which stays")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else sites of a shell's background job would not hear it
    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedloom-memory-")))
        folder = folder.resolve()
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        return measure(folder, given.rounds)


def measure(folder: Path, rounds: int) -> int:
    os.environ["TMPDIR"] = str(folder / "tmp")  # of every process that is started here
    path = prepared(folder, rounds)
    command = [sys.executable, "-m", "fedloom"]
    sites = []
    for site in SITES:
        with (folder / f"{site}.log").open("wb") as log:
            join = [
                *command,
                "join",
                str(folder / "kits" / site),
                "--data",
                str(folder / "rows.jsonl"),
                "--threads",
                "1",
            ]
            sites.append(subprocess.Popen(join, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
    run = folder / "run"
    serve = [*command, "serve", str(folder / "kits" / "server"), str(path), "--out", str(run), "--quiet"]
    server = subprocess.Popen(serve, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        sizes = sampled(server, run / "events.jsonl")
    finally:
        for process in [server, *sites]:
            process.send_signal(signal.SIGINT)
        for process in [server, *sites]:
            process.wait(timeout=120)
    finished = [e for e in read_events(run / "events.jsonl") if e["event"] == "round_finished"]
    assert len(finished) == rounds, f"{len(finished)} of {rounds} rounds were finished"
    assert all(e["updates"] == len(SITES) for e in finished)
    fifth = rounds // 5
    early = [median(sizes, range(fifth + 1, 2 * fifth + 1), what) for what in (0, 1, 2)]
    late = [median(sizes, range(rounds - fifth + 1, rounds + 1), what) for what in (0, 1, 2)]
    left = [p for p in (folder / "kits").glob("*/*") if JOB.fullmatch(p.name)] + list((folder / "tmp").iterdir())
    print(f"rounds={rounds}\nupdate_bytes={finished[-1]['upload_bytes'] // len(SITES)}")
    print(f"seconds_a_round={statistics.median(e['seconds'] for e in finished):.2f}")
    print(f"early_mb={early[0]:.0f}\nlate_mb={late[0]:.0f}\ngrowth={late[0] / early[0]:.3f}\nfolders_left={len(left)}")
    print(f"service_mb={early[1]:.0f},{late[1]:.0f}\njob_mb={early[2]:.0f},{late[2]:.0f}")
    for each in left:
        print(f"  {each.relative_to(folder)}")
    return 0 if late[0] <= 1.2 * early[0] and late[0] <= 1000 and not left else 1


def median(sizes: dict[int, list[tuple[float, float, float]]], rounds: range, what: int) -> float:
    """MB: of both processes, of the service, of the job."""
    return statistics.median(sample[what] for n in rounds for sample in sizes.get(n, ())) / 1e6


def sampled(server: subprocess.Popen[bytes], events: Path) -> dict[int, list[tuple[float, float, float]]]:
    """Round → resident bytes of the server's service and job together, and of each, until the command ends."""
    sizes: dict[int, list[tuple[float, float, float]]] = {}
    number, read = 0, 0
    while server.poll() is None:
        time.sleep(0.2)
        if events.exists():
            with events.open("rb") as file:
                file.seek(read)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            read += len(whole)
            begun = [e["round"] for e in map(json.loads, whole.splitlines()) if e["event"] == "round_started"]
            number = begun[-1] if begun else number
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(server.pid).children(recursive=True)
            job = sum(p.memory_info().rss for p in below if "runner_process" in " ".join(p.cmdline()))
            both = sum(p.memory_info().rss for p in below)
            sizes.setdefault(number, []).append((both, both - job, job))
    return sizes


def prepared(folder: Path, rounds: int) -> Path:
    """Model, data, kits; the recipe's file."""
    config: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "vocab_size": 300}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    LlamaForCausalLM(LlamaConfig(**config, **heads, tie_word_embeddings=True)).save_pretrained(folder / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / "model")
    rows = [{"instruction": f"{i}:", "output": str(i)} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = Recipe.parse(
        {
            "name": "memory",
            "model": str(folder / "model"),
            "data": {"path": str(folder / "rows.jsonl"), "max_length": 16, "template": "plain"},
            "split": {"splitter": "uniform", "num_clients": 3, "test": 0.1},
            "adapter": {"method": "full"},
            "train": {"steps": 1, "batch_size": 1, "lr": 1e-4},
            "federation": {"rounds": rounds, "min_clients": 3},
            "runtime": {"device": "cpu", "threads": 1},
            "evaluation": {"every": 0, "suite": None, "answers": 0},
        }
    )
    project = {"name": "memory", "server": {"port": free_port()}, "sites": list(SITES)}
    (folder / "project.yaml").write_text(dump_yaml(project), encoding="utf-8")
    provision = ["provision", str(folder / "project.yaml"), "--out", str(folder / "kits")]
    subprocess.run([sys.executable, "-m", "fedloom", *provision], check=True, stdout=subprocess.DEVNULL)
    path = folder / "memory.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
