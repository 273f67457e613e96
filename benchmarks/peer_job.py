"""One job for all peers: a client's local training in plain transformers and peft, on token ids that a file lists.

It is imported by benchmarks/peers.py, by the Flower app (flower_app.py) in a virtual environment of its own, and is itself
the process of `process per client`; so it knows nothing of fedloom. The job's folder holds:

    job.json              model: its folder; lr, betas, eps, clip; pad; rounds: [round][client][step] → sequences, each
                          [ids, how many of them are the prompt]
    initial.safetensors   the adapter that all start from, by peft's names
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

Tensors = dict[str, torch.Tensor]


class Job:
    """A job's folder, read."""

    def __init__(self, folder: Path) -> None:
        values = json.loads((folder / "job.json").read_text())
        self.folder, self.values = folder, values
        self.rounds: list[list[list[list[tuple[list[int], int]]]]] = values["rounds"]
        self.initial: Tensors = load_file(folder / "initial.safetensors")

    def model(self) -> Any:
        """The base with a fresh adapter in it, as a client loads it."""
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)
        base = AutoModelForCausalLM.from_pretrained(self.values["model"], dtype=torch.float32)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(base, config)

    def batch(self, sequences: Sequence[tuple[list[int], int]]) -> Tensors:
        """Padded on the right, labels of the answers only."""
        longest = max(len(ids) for ids, _ in sequences)
        ids = torch.full((len(sequences), longest), self.values["pad"])
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (tokens, prompt) in enumerate(sequences):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, prompt : len(tokens)] = ids[row, prompt : len(tokens)]
            mask[row, : len(tokens)] = 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    def train(self, model: Any, adapter: Tensors, round: int, client: int) -> tuple[Tensors, float]:
        """(the adapter after this client's steps of this round, their mean loss). Round and client count from 0."""
        set_peft_model_state_dict(model, adapter)
        own = [p for p in model.parameters() if p.requires_grad]
        values = self.values
        optimizer = torch.optim.AdamW(own, lr=values["lr"], betas=values["betas"], eps=values["eps"], weight_decay=0.0)
        model.train()
        losses = []
        for sequences in self.rounds[round][client]:
            loss = model(**self.batch(sequences), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own, values["clip"])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found = {n: t.detach().clone() for n, t in get_peft_model_state_dict(model).items()}
        return found, sum(losses) / len(losses)

    @torch.no_grad()
    def loss(self, model: Any, adapter: Tensors) -> float:
        """Mean loss of `adapter` over all batches of the first round."""
        set_peft_model_state_dict(model, adapter)
        model.eval()
        found = [float(model(**self.batch(step), use_cache=False).loss) for client in self.rounds[0] for step in client]
        return sum(found) / len(found)


def mean(adapters: Sequence[Tensors]) -> Tensors:
    """FedAvg of clients with equally many examples."""
    return {n: torch.stack([a[n].double() for a in adapters]).mean(0).float() for n in adapters[0]}


def alone(folder: Path) -> None:
    """All of it in one process, as a loop of one's own: one model, adapters in and out by peft's own functions."""
    job = Job(folder)
    model, adapter = job.model(), job.initial
    for round, clients in enumerate(job.rounds):
        adapter = mean([job.train(model, adapter, round, client)[0] for client in range(len(clients))])
    save_file(adapter, folder / "bare.safetensors")


def one_client(folder: Path, round: int, client: int) -> None:
    """One client's round in a process of its own: `adapter.safetensors` in, `client-K.safetensors` out."""
    job = Job(folder)
    trained, _ = job.train(job.model(), load_file(folder / "adapter.safetensors"), round, client)
    save_file(trained, folder / f"client-{client}.safetensors")


def processes(folder: Path) -> None:
    """A process for each client and round, one after another."""
    import subprocess

    adapter, clients = (
        load_file(folder / "initial.safetensors"),
        json.loads((folder / "job.json").read_text())["rounds"],
    )
    for round in range(len(clients)):
        save_file(adapter, folder / "adapter.safetensors")
        for client in range(len(clients[round])):
            command = [sys.executable, __file__, "client", str(folder), str(round), str(client)]
            subprocess.run(command, check=True)
        adapter = mean([load_file(folder / f"client-{c}.safetensors") for c in range(len(clients[round]))])
    save_file(adapter, folder / "processes.safetensors")


def main() -> int:
    what, folder, *numbers = sys.argv[1:]
    {"bare": alone, "processes": processes, "client": one_client}[what](Path(folder), *map(int, numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
