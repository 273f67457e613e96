"""The checks of an algorithm, each a function of a `Case` that returns sentences: what was expected, what was seen, the fix.

An empty list means that the check passed. These hold for every algorithm; claims.py has those of what one declares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch

from fedloom.algorithms.about import FAMILIES, About
from fedloom.messages.at_rest import from_bytes, to_bytes
from fedloom.messages.types import Payload, Update
from fedloom.testing.case import Case
from fedloom.testing.compare import differing, equal, same
from fedloom.testing.probe import Log

#: Letters of `about.travels`, for which tables have room.
TRAVELS = 26


def check_words(case: Case) -> list[str]:
    """`about` and `properties` as they are written down, before anything runs."""
    found, said, claims = [], vars(case.cls).get("about"), case.properties
    if not isinstance(said, About):
        return [
            "the class has no `about` of its own, so `fedloom algorithms` shows question marks: give it "
            "about = About(family, travels, paper, up=…, down=…, server=…, client=…)"
        ]
    if said.family not in FAMILIES:
        found.append(f"about.family is {said.family!r}, but must be one of {', '.join(FAMILIES)}")
    if not 0 < len(said.travels) <= TRAVELS:
        found.append(
            f"about.travels is {said.travels!r} ({len(said.travels)} characters), but tables have room for {TRAVELS}: "
            "shorten it"
        )
    if said.paper and not re.fullmatch(r"\S+ et al\. (19|20)\d\d, arXiv \d{4}\.\d{5}", said.paper):
        found.append(
            f"about.paper is {said.paper!r}: write it as 'Name et al. 2024, arXiv 2401.00001', or leave it empty"
        )
    if claims.asynchronous and (claims.personal or claims.pooled or claims.order_independent):
        found.append(
            "properties.asynchronous excludes personal, pooled and order_independent, since a round is what arrives first: "
            "set order_independent=False, and leave the others out"
        )
    return found


def check_layout(case: Case) -> list[str]:
    """Updates are what `update_layout` announces."""
    found = refused(case.whole.log)
    server = case.server()
    layout = server.update_layout()
    for update in case.first_updates()[:1]:
        if layout is not None and {n: t.shape for n, t in update.payload.tensors.items()} != layout.shapes:
            found.append(f"accept() took an update that update_layout() does not describe. {_mismatch(update, layout)}")
    return found


def refused(log: Log) -> list[str]:
    """The first update that the server refused, and why."""
    return [
        f"accept() refused the update of {update.client} in round {update.round}: {error}. {_mismatch(update, layout)}"
        for update, error, layout in log.refused[:1]
    ]


def _mismatch(update: Update, layout: object) -> str:
    shapes = {n: tuple(s) for n, s in getattr(layout, "shapes", {}).items()}
    sent = {n: tuple(t.shape) for n, t in update.payload.tensors.items()}
    more = [f"{n} {s}" for n, s in sent.items() if shapes.get(n) != s][:3]
    fewer = [f"{n} {s}" for n, s in shapes.items() if sent.get(n) != s][:3]
    return (
        f"shared_state() sent {', '.join(more) or 'nothing else'}, and update_layout() says "
        f"{', '.join(fewer) or 'nothing else'}: make the two agree"
    )


def check_repeatable(case: Case) -> list[str]:
    """One seed gives one result, another seed another; training changes something."""
    first, found = case.whole.bits, []
    torch.manual_seed(123)  # whatever state others leave the global generator in
    again = case.run().bits
    if again != first:
        found.append(
            f"two runs with one seed differ in {', '.join(differing(first, again))}: draw random numbers from "
            "torch_generator(self.seed, purpose, self.round, self.client), not from torch's global generator, and do not "
            "go through sets"
        )
    if case.run({"seed": case.recipe.seed + 1}).bits["adapter"] == first["adapter"]:
        found.append(
            "another seed gives the same adapter: use self.seed, and the model and batches that fedloom passes"
        )
    if first["loss"]["after"] == first["loss"]["before"]:
        found.append(
            "the loss after training is the loss before it to the last bit: no client's training reaches the result"
        )
    return found


def check_client_state(case: Case) -> list[str]:
    """A client half takes nothing from one training to the next, except in `kept`."""
    if case.properties.offsite:
        return []  # its client half has to keep the emulator that it was sent once
    expected, run = case.whole.bits, case.run(fresh=True)
    if run.bits == expected:
        return []
    guilty = [
        n for n in sorted(run.log.remembered)[:12] if case.run(fresh=True, carried=frozenset({n})).bits == expected
    ]
    named = ", ".join(f"self.{n}" for n in guilty or sorted(run.log.remembered)[:5]) or "the live model"
    return [
        f"the client half remembers {named} from one client's training to the next one's: one object plays all clients in a "
        "simulation, and elsewhere each has its own, so this leaks to other clients here and is lost there. Keep it in "
        "self.kept, which is stored with each client, or set it in receive()"
    ]


def check_resume(case: Case) -> list[str]:
    """A run that was killed in round 2 and resumed ends with the bits of an undisturbed one."""
    killed = case.run(kill=("train", 2, 1))
    if killed.bits:
        return ["the run ended before its second round, so that nothing could be resumed: use federation.rounds=3"]
    resumed = case.run(resume=killed.folder)
    if resumed.bits == case.whole.bits:
        return []
    before, after = case.whole.log.attributes[0], resumed.log.loaded or {}
    lost = [n for n in sorted(before) if before[n] != after.get(n)]
    start = f"a run that was killed in round 2 and resumed differs from a whole one in {_few(resumed.bits, case)}"
    if "kept" in lost or "shared" in lost:
        name = "kept" if "kept" in lost else "shared"
        return [
            f"{start}: self.{name} did not come back from the checkpoint. server_state() or load_server_state() is "
            "overridden and leaves it out: call super() there, or delete the two, since self.kept is stored by itself"
        ]
    if lost:
        return [
            f"{start}: the server changed {', '.join(f'self.{n}' for n in lost[:5])} in round 1, and a resumed run does not "
            "have it. Keep tensors in self.kept.tensors and numbers in self.kept.meta, which are part of every checkpoint"
        ]
    return [
        f"{start}, though the server's attributes came back: does the client half remember something in plain attributes, "
        "or is a kept tensor a window of another one (clone() it)?"
    ]


def _few(bits: dict[str, object], case: Case) -> str:
    return ", ".join(differing(bits, case.whole.bits))


def check_server_state(case: Case) -> list[str]:
    """What is stored of the server moves into a new half bit for bit."""
    stored = case.whole.log.states[-1]
    server = case.server()
    fresh = from_bytes(to_bytes(server.server_state()))
    server.load_server_state(from_bytes(to_bytes(stored)))
    if same(server.server_state(), stored):
        if case.properties.personal:
            return []
        if same(fresh, stored):
            return ["server_state() is the same after training as before: put what aggregate() changes into self.kept"]
        if server.deployed().sha256() != case.whole.bits["adapter"]:
            return [
                "deployed() gives another result once the server's state was loaded: build it from self.shared and self.kept"
            ]
        return []
    again = server.server_state()
    names = [n for n in {*stored.tensors, *again.tensors} if not equal(stored.tensors.get(n), again.tensors.get(n))]
    return [
        f"load_server_state() does not give back what server_state() wrote: {', '.join(sorted(names)[:5]) or 'meta'} "
        "differs. The two have to be inverse to each other; without them self.kept is stored by itself"
    ]


def check_refusals(case: Case) -> list[str]:
    """What a broken or hostile client could send is refused, and changes nothing."""
    server, (update, *_) = case.server(), case.first_updates()
    before, found = from_bytes(to_bytes(server.server_state())), []
    for what, tensors in _spoiled(update, server.update_layout() is not None):
        try:
            server.accept(replace(update, payload=Payload(tensors, update.payload.meta)))
        except ValueError:
            continue
        except Exception as error:  # another's code
            found.append(f"accept() must raise ValueError for {what}, but raised {type(error).__name__}: {error}")
            continue
        found.append(
            f"accept() took {what}: raise ValueError, which Algorithm.accept does where update_layout() says what fits"
        )
    if not same(server.server_state(), before):
        found.append("accept() changed the server's state: only aggregate() may, since an update can still be refused")
    return found


def _spoiled(update: Update, fixed: bool) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    tensors = update.payload.tensors
    yield "an update with a tensor of a foreign name", {**tensors, "foreign": torch.ones(1)}
    for name, tensor in [(n, t) for n, t in tensors.items() if t.is_floating_point()][:1]:
        yield f"an update without {name}", {n: t for n, t in tensors.items() if n != name}
        if fixed:
            yield f"an update whose {name} has another shape", {**tensors, name: tensor.flatten()[:-1]}
        if tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]:
            yield f"an update whose {name} is transposed", {**tensors, name: tensor.T.contiguous()}
        for bad in (torch.nan, torch.inf, -torch.inf):
            spoiled = tensor.clone()
            spoiled.view(-1)[-1] = bad
            yield f"an update with {bad} in {name}", {**tensors, name: spoiled}
