"""A site's trainer: the process, or the ranks, with the model and the site's data.

`python -m fedloom.runtimes.sites.trainer SOCKET` starts it.

    receives the recipe     → loads the site's data, split here (or beforehand) → tokens, model, client; returns counts
    receives an assignment  → the client does it → returns what the site's policy allows

The site's own settings (paths of data and model, batch size, device, columns) are put into the recipe here and never
leave. This file does not know who sends requests; that is the site's agent (agent.py).
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import re
import shutil
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedloom.common import environment, registry
from fedloom.common.errors import UserError, describe_disk_error
from fedloom.common.logs import print_sentences
from fedloom.data.corpus import Corpus, Partition
from fedloom.data.federated import FederatedData
from fedloom.data.loading import for_objective, load_corpus
from fedloom.data.shard_file import is_shard, read_shard
from fedloom.data.splitters import divide, select_questions
from fedloom.data.tokenization import tokenise
from fedloom.federation.checks import check_site
from fedloom.federation.client import Client
from fedloom.federation.workplace import open_client, open_models, open_store, open_template
from fedloom.messages import wire
from fedloom.models.emulator import shipping
from fedloom.models.loading import load_tokenizer, pick_device
from fedloom.recipe.recipe import Recipe
from fedloom.runtimes.ranks.rank import BY_ITSELF, Place, end_rank, serve
from fedloom.runtimes.sites.policy import Policy, Refused
from fedloom.runtimes.sites.project import SiteConfig, load_section
from fedloom.training.parallel import Ranks
from fedloom.training.precision import choose_precision

log = logging.getLogger("fedloom.runtimes.sites.trainer")  # __name__ is __main__ in the process that this file starts

RUN = re.compile(r"[0-9a-f]{8,64}")


@dataclass
class Opened:
    """A site that knows the recipe.

    Attributes:
        recipe: resolved, with the site's own settings in it.
        counts: what the server learns of the data: numbers of examples, questions and supervised tokens.
    """

    client: Client
    recipe: dict[str, Any]
    counts: dict[str, int]


def localised(recipe: Recipe, site: SiteConfig, ranks: int = 1) -> Recipe:
    """Return the recipe as this site runs it. With a smaller batch, a step has more batches and the same examples.

    Args:
        ranks: the number of processes that the site has started for it.

    Raises UserError if a batch size does not divide a step.
    """
    changes: dict[str, Any] = {"data.path": site.data}
    if site.columns is not None:
        changes["data.columns"] = dict(site.columns)
    if site.model is not None:
        changes["model.name"] = site.model
    if site.device is not None:
        changes["runtime.device"] = site.device
    changes["runtime.threads"] = site.threads or environment.available_cores()
    changes["runtime.ranks"] = ranks
    changes["runtime.parallel"] = (site.parallel or recipe.runtime.parallel) if ranks > 1 else None
    if site.batch_size is not None:
        step = recipe.train.batch_size * recipe.train.accumulation
        if step % site.batch_size:
            raise UserError(
                f"batch_size={site.batch_size} of this site does not divide the recipe's step of {step} examples: "
                "take one that does"
            )
        changes |= {"train.batch_size": site.batch_size, "train.accumulation": step // site.batch_size}
    return recipe.with_values(changes)


def own_data(recipe: Recipe, site: SiteConfig, sites: int) -> tuple[Corpus, Partition, tuple[int, ...]]:
    """Load the site's examples, their split, and the test examples that are asked as questions.

    A shard was split beforehand. Other data are split here, by the recipe's shares. The site takes its part of the
    questions that the recipe asks for each task.
    """
    path = Path(site.data).expanduser()
    if is_shard(path):
        return read_shard(path, site.client, recipe.seed)
    corpus = load_corpus(recipe.data, by=recipe.split.by, seed=recipe.seed, splitter=recipe.split.splitter)
    corpus = for_objective(corpus, recipe.train.objective)
    categories = [e.category for e in corpus.examples]
    shard = divide(range(len(categories)), categories, recipe.split, site.client, recipe.seed)
    partition = Partition({site.client: shard}, "own", recipe.seed)
    limit = recipe.evaluation.limit
    asked = select_questions(corpus, partition, None if limit is None else math.ceil(limit / sites), recipe.seed)
    return corpus, partition, asked[site.client]


def run_folder(home: Path, run: str, keep: int) -> Path:
    """Return the folder of a run's state and results. Of the other runs, only the `keep` - 1 opened last are kept."""
    folder = home / "runs" / run
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    others = [p for p in folder.parent.iterdir() if RUN.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    others.remove(folder)
    for old in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True)[keep - 1 :]:
        log.info(f"the run {old.name} is older than the {keep} that this site keeps (keep_runs): deleted")
        shutil.rmtree(old, ignore_errors=True)
    return folder


def precision_here(wanted: str, ranks: Ranks) -> str:
    """Choose fp32, bf16 or fp16 for this site's device. Each rank probes it, and all ranks use the same one."""
    chosen = choose_precision(wanted, torch.device(ranks.device))
    return "fp32" if ranks.total(float(chosen == "fp32")) else chosen


def open_site(
    values: Mapping[str, Any],
    run: str,
    sites: int,
    site: SiteConfig,
    place: Place = BY_ITSELF,
    files: Mapping[str, bytes] | None = None,
) -> Opened:
    """Open what a site needs before its first assignment. Raises UserError.

    Args:
        place: which of the site's ranks this process is.
        files: the tokenizer, from a server that does not give the model away. The site then loads neither itself.
    """
    if not RUN.fullmatch(run):
        raise UserError("the run has no proper id")
    recipe = localised(Recipe.parse(values), site, place.count)
    check_site(recipe)
    torch.set_num_threads(recipe.runtime.threads_of_a_rank)
    ranks = place.joined(recipe.runtime.parallel, pick_device(recipe.runtime.device))
    recipe = recipe.with_values({"train.precision": precision_here(recipe.train.precision, ranks)})
    home = Path(site.home)
    with ranks.in_turn():
        corpus, partition, questions = own_data(recipe, site, sites)
        tokenizer = (
            shipping.decode_tokenizer(shipping.files_to_tensors(files)) if files else load_tokenizer(recipe.model)
        )
        template = open_template(recipe, tokenizer)
        sequences = tokenise(corpus, template, recipe.data.max_length, home / "tokenised")
    suite = registry.suites.get(recipe.evaluation.suite) if recipe.evaluation.suite else None
    if suite is not None:
        suite.check([corpus.examples[i] for i in questions])
    data = FederatedData(corpus, sequences, partition, {site.client: questions if suite else ()})
    folder = run_folder(home, run, site.keep_runs) if place.first else home / "runs" / run
    shard = partition.shards[site.client]
    counts = {
        "train": len(shard.train),
        "validation": len(shard.validation),
        "test": len(shard.test),
        "questions": len(questions) if suite else 0,
        "tokens": sequences.supervised_tokens(shard.train),
    }
    models = open_models(recipe, ranks)
    client = open_client(recipe, models, data, template, open_store(recipe, folder), folder / "adapters", ranks, home)
    return Opened(client, recipe.resolved(), counts)


class Room:
    """Answers one request after another in the trainer's process."""

    def __init__(self, site: SiteConfig, policy: Policy, place: Place = BY_ITSELF) -> None:
        self._site = site
        self._policy = policy
        self._place = place
        self._opened: Opened | None = None

    def answer(self, kind: str, body: bytes | bytearray) -> tuple[dict[str, Any], bytes]:
        """Return the answer's header and body. An error becomes a code; the log has the details."""
        try:
            if kind == "prepare":
                return {"state": "done"}, self._prepare(json.loads(body))
            return {"state": "done"}, self._work(body)
        except Refused as error:
            return {"state": "refused", "detail": str(error)}, b""
        except UserError as error:
            log.warning(f"this site cannot do this work: {error}")
            return {"state": "failed", "reason": "misconfigured", "detail": self._policy.words(str(error))}, b""
        except wire.WireError as error:
            return {"state": "failed", "reason": "bad_message", "detail": str(error)}, b""
        except Exception as error:  # the site's boundary: an error's text may contain data, its type and line do not
            if self._place.count > 1:
                end_rank(error)
            traceback.print_exc()
            if trouble := describe_disk_error(error):
                return {"state": "failed", "reason": "disk", "detail": self._policy.words(trouble)}, b""
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} in {Path(where.filename).stem}, line {where.lineno}"
            detail = f"{place}: {error}" if self._policy.error_text else place
            return {"state": "failed", "reason": "error", "detail": detail}, b""

    def _prepare(self, orders: Mapping[str, Any]) -> bytes:
        self._policy.check(orders["recipe"])
        sites = max(1, int(orders["sites"]))
        files = {name: base64.b64decode(text) for name, text in orders.get("files", {}).items()}
        self._opened = open_site(orders["recipe"], str(orders["run"]), sites, self._site, self._place, files)
        return json.dumps(self._opened.counts).encode()

    def _work(self, body: bytes | bytearray) -> bytes:
        if self._opened is None:
            raise Refused("this site received work before a recipe")
        assignment = wire.decode_assignment(body, self._policy.max_message_bytes)
        if assignment.client != self._site.client:
            raise Refused("this site received another client's work")
        if self._policy.rounds is not None and assignment.round > self._policy.rounds:
            raise Refused(f"round {assignment.round} is over this site's {self._policy.rounds} (rounds)")
        outcome = self._opened.client.handle(replace(assignment, recipe=self._opened.recipe))
        log.info(f"{assignment.kind} of round {assignment.round}: {getattr(outcome, 'detail', 'done')}")
        return wire.encode_outcome(self._policy.outgoing(outcome))


def main(arguments: list[str]) -> None:
    print_sentences()
    site: SiteConfig = load_section(SiteConfig, Path(os.environ["FEDLOOM_SITE"]), "the site's file")
    policy, place = Policy.load(Path(site.policy)), Place.of(arguments)
    serve(place, policy.max_message_bytes, Room(site, policy, place).answer)


if __name__ == "__main__":
    main(sys.argv[1:])
