"""The job of peer_job.py as a Flower app, by Flower's documented interface, in the way of its template for language models.

A `ClientApp` loads the model and peft's adapter for every message, puts the weights that came into it, trains, and sends the
adapter back; `FedAvg` averages. benchmarks/peers.py starts it with Flower's own virtual environment, which has no fedloom.
The job's folder stands in FEDLOOM_PEER_JOB, also for the processes that Flower starts.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peer_job import Job
from safetensors.torch import save_file

FOLDER = Path(os.environ.get("FEDLOOM_PEER_JOB", "."))
client, server = ClientApp(), ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    job = Job(FOLDER)
    round, number = int(message.content["config"]["server-round"]) - 1, int(context.node_config["partition-id"])
    arrived = message.content["arrays"].to_torch_state_dict()
    adapter, loss = job.train(job.model(), arrived, round, number)
    examples = sum(len(step) for step in job.rounds[round][number])
    content = {"arrays": ArrayRecord(adapter), "metrics": MetricRecord({"train_loss": loss, "num-examples": examples})}
    return Message(content=RecordDict(content), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    job = Job(FOLDER)
    clients = len(job.rounds[0])
    strategy = FedAvg(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
    )  # fmt: skip
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(job.initial), num_rounds=len(job.rounds))
    save_file(result.arrays.to_torch_state_dict(), FOLDER / "flower.safetensors")


def simulate() -> None:
    """Start Flower's simulation; the apps are those of the module, which its workers import by name."""
    import flower_app
    from flwr.simulation import run_simulation

    run_simulation(
        server_app=flower_app.server,
        client_app=flower_app.client,
        num_supernodes=len(Job(FOLDER).rounds[0]),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    simulate()
