"""One of the ranks that train a simulation's clients together.

`python -m fedloom.runtimes.ranks.main SOCKET RANK COUNT MEETING` starts it.

Each rank receives the resolved recipe of a run. It loads the same corpus, makes the same split, and loads its own base
model or its shard of one. Then it does what the simulator requests (pool.py). `fedloom.runtimes.sites.trainer` has the
ranks of a site. This file does not know the coordinator.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedloom.common.errors import UserError
from fedloom.common.logs import print_sentences
from fedloom.federation.client import Client
from fedloom.federation.workplace import open_simulated_client
from fedloom.messages import wire
from fedloom.models.loading import pick_device
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.ranks.pool import LIMIT
from fedloom.runtimes.ranks.rank import Place, end_rank, serve


class Cluster:
    """Answers one request after another in a rank."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._recipe: dict[str, Any] = {}
        self._client: Client | None = None

    def answer(self, kind: str, body: bytes | bytearray) -> tuple[dict[str, Any], bytes]:
        """Return the answer's header and body. An unexpected error ends this rank."""
        try:
            if kind == "prepare":
                return self._prepare(json.loads(body))
            assert self._client is not None
            assignment = wire.decode_assignment(body, LIMIT)
            outcome = self._client.handle(replace(assignment, recipe=self._recipe))
            return {"state": "done"}, wire.encode_outcome(outcome) if self._place.first else b""
        except Exception as error:
            end_rank(error)

    def _prepare(self, orders: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        try:
            recipe = Recipe.parse(orders["recipe"])
            runtime = recipe.runtime
            ranks = self._place.joined(runtime.parallel, pick_device(runtime.device))
            self._client = open_simulated_client(recipe, Path(orders["folder"]), ranks)
        except UserError as error:
            return {"state": "failed", "detail": str(error)}, b""
        self._recipe = orders["recipe"]
        return {"state": "done"}, b""


def main(arguments: list[str]) -> None:
    print_sentences()
    place = Place.of(arguments)
    serve(place, LIMIT, Cluster(place).answer)


if __name__ == "__main__":
    main(sys.argv[1:])
