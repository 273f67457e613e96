"""One lazy name table for each extension point, open to other packages through entry points.

A name maps to ``module:attribute``, imported on first use, so that listing algorithms does not import torch models. A
package adds names under an entry-point group (``fedloom.algorithms``, ``fedloom.corpora`` …); Python code adds them
with `register`. A package that is broken, or whose name another has taken, costs those who use it a sentence and
everybody else nothing. docs/extending.md shows all of it.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fedloom.common.errors import UserError, suggest
from fedloom.common.extras import needing_extras


class Registry:
    """Names of one kind.

    Args:
        kind: the noun used in messages.
        group: the entry-point group after ``fedloom.``.
        builtin: name → ``module:attribute``.
        expected: what a name has to stand for, as ``module:class``: a subclass of it, or under `instance` an object of
            it. None takes anything that can be called.
    """

    def __init__(
        self, kind: str, group: str, builtin: dict[str, str], expected: str | None = None, *, instance: bool = False
    ) -> None:
        self.kind = kind
        self.group = group
        self._targets: dict[str, Any] = dict(builtin)
        self._expected = expected
        self._instance = instance
        self._claims: dict[str, list[EntryPoint]] = {}
        self._scanned = False
        self._noted: list[str] = []

    def register(self, name: str, target: Any) -> None:
        """Add or replace `name`. `target` is the object itself or ``module:attribute``."""
        self._targets[name] = target

    def forget(self, name: str) -> None:
        """Take back `register`."""
        del self._targets[name]

    @contextmanager
    def replaced(self, name: str, target: Any) -> Iterator[None]:
        """In this block `name` stands for `target`."""
        before = self._targets.get(name)
        self.register(name, target)
        try:
            yield
        finally:
            self.forget(name)
            if before is not None:
                self.register(name, before)

    def registered(self, name: str) -> Callable[[Any], Any]:
        """`register` as a decorator."""

        def add(target: Any) -> Any:
            self.register(name, target)
            return target

        return add

    def names(self) -> list[str]:
        self._scan()
        return sorted({*self._targets, *self._claims})

    def __contains__(self, name: str) -> bool:
        self._scan()
        return name in self._targets or name in self._claims

    def get(self, name: str) -> Any:
        """The object behind `name`.

        Raises:
            UserError: no such name (with the nearest); two packages claim it; its package cannot be imported, or gives
                something that is not of this kind.
        """
        self._scan()
        if name not in self:
            raise UserError(f"unknown {self.kind} {name!r}: {suggest(name, self.names())}")
        claims = self._claims.get(name, [])
        if name in self._targets:
            if claims:
                self._note(
                    f"{self.kind} {name!r} is fedloom's own; {_origins(claims)} claims the name too and is not used: "
                    "its authors have to choose another"
                )
            target = self._targets[name]
            if isinstance(target, str):
                self._targets[name] = target = _imported(target)
            self._check(name, target, "")
            return target
        if len(claims) > 1:
            raise UserError(f"{self.kind} {name!r} is claimed by {_origins(claims)}: uninstall all of them but one")
        origin = _origins(claims)
        try:
            target = claims[0].load()
        except Exception as error:  # a plugin's code may raise anything; the fix is the same
            raise UserError(
                f"{self.kind} {name!r} comes from {origin}, which cannot be imported ({_cause(error)}): install what it "
                "lacks, ask its authors, or uninstall it"
            ) from error
        self._check(name, target, f" from {origin}")
        return target

    def take_notes(self) -> list[str]:
        """What the user should know of the names that were asked for, each sentence once in a process."""
        notes, self._noted = [n for n in self._noted if n not in _SAID], []
        _SAID.update(notes)
        return notes

    def _note(self, sentence: str) -> None:
        if sentence not in self._noted:
            self._noted.append(sentence)

    def _check(self, name: str, target: Any, origin: str) -> None:
        """Raise UserError unless `target` is what this registry holds."""
        expected = _imported(self._expected) if self._expected else None
        if expected is None:
            fits, wanted = callable(target), "a function"
        elif self._instance:
            fits, wanted = isinstance(target, expected), f"a {expected.__name__}"
        else:
            fits, wanted = (
                inspect.isclass(target) and issubclass(target, expected),
                f"a subclass of {expected.__name__}",
            )
        if not fits:
            raise UserError(
                f"{self.kind} {name!r}{origin} is {_described(target)}, not {wanted} ({self._expected or self.group}): "
                "docs/extending.md shows one"
            )
        if inspect.isclass(target) and (open_ := sorted(getattr(target, "__abstractmethods__", ()))):
            raise UserError(f"{self.kind} {name!r}{origin} does not say {', '.join(open_)}: write that method")

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        for point in entry_points(group=f"fedloom.{self.group}"):
            self._claims.setdefault(point.name, []).append(point)


#: Notes that this process has given out.
_SAID: set[str] = set()


def _imported(target: str) -> Any:
    """Raises UserError where an extra is missing."""
    module, _, attribute = target.partition(":")
    with needing_extras():
        return getattr(import_module(module), attribute)


def _origins(claims: list[EntryPoint]) -> str:
    """The package is named as pip knows it."""
    named = [f"{p.dist.name} {p.dist.version} ({p.value})" if p.dist else p.value for p in claims]
    return ("package " if len(named) == 1 else "packages ") + " and ".join(sorted(named))


def _cause(error: Exception) -> str:
    """An import's error with the line that raised it, where that is the package's own."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}{place}"


def _described(target: Any) -> str:
    return f"the class {target.__name__}" if inspect.isclass(target) else f"a {type(target).__name__}"


algorithms = Registry(
    "algorithm",
    "algorithms",
    {
        "fedavg": "fedloom.algorithms.averaging.fedavg:FedAvg",
        "local": "fedloom.algorithms.averaging.baselines:Local",
        "global": "fedloom.algorithms.averaging.baselines:Global",
        "fedit": "fedloom.algorithms.lora.fedit:FedIT",
        "ffa_lora": "fedloom.algorithms.lora.ffa_lora:FFALoRA",
        "flora": "fedloom.algorithms.lora.flora:FLoRA",
        "flexlora": "fedloom.algorithms.lora.flexlora:FlexLoRA",
        "hetlora": "fedloom.algorithms.lora.hetlora:HetLoRA",
        "fedsa_lora": "fedloom.algorithms.lora.fedsa_lora:FedSALoRA",
        "rolora": "fedloom.algorithms.lora.rolora:RoLoRA",
        "fedex_lora": "fedloom.algorithms.lora.fedex_lora:FedExLoRA",
        "lora_fair": "fedloom.algorithms.lora.lora_fair:LoRAFAIR",
        "fed_sb": "fedloom.algorithms.lora.fed_sb:FedSB",
        "fedsvd": "fedloom.algorithms.lora.fedsvd:FedSVD",
        "fedrot_lora": "fedloom.algorithms.lora.fedrot_lora:FedRotLoRA",
        "slora": "fedloom.algorithms.lora.slora:SLoRA",
        "fedprox": "fedloom.algorithms.averaging.fedprox:FedProx",
        "fedbuff": "fedloom.algorithms.averaging.fedbuff:FedBuff",
        "scaffold": "fedloom.algorithms.averaging.scaffold:Scaffold",
        "fedavgm": "fedloom.algorithms.averaging.fedopt:FedAvgM",
        "fedadagrad": "fedloom.algorithms.averaging.fedopt:FedAdagrad",
        "fedadam": "fedloom.algorithms.averaging.fedopt:FedAdam",
        "fedyogi": "fedloom.algorithms.averaging.fedopt:FedYogi",
        "diloco": "fedloom.algorithms.averaging.diloco:DiLoCo",
        "median": "fedloom.algorithms.robust.coordinatewise:Median",
        "trimmed_mean": "fedloom.algorithms.robust.coordinatewise:TrimmedMean",
        "krum": "fedloom.algorithms.robust.krum:Krum",
        "geometric_median": "fedloom.algorithms.robust.geometric_median:GeometricMedian",
        "norm_bound": "fedloom.algorithms.robust.norm_bound:NormBound",
        "pfedme": "fedloom.algorithms.personal.pfedme:PFedMe",
        "ditto": "fedloom.algorithms.personal.ditto:Ditto",
        "fedper": "fedloom.algorithms.personal.fedper:FedPer",
        "fedrep": "fedloom.algorithms.personal.fedrep:FedRep",
        "feddpa": "fedloom.algorithms.personal.feddpa:FedDPA",
        "fedkseed": "fedloom.algorithms.low_traffic.fedkseed:FedKSeed",
        "fedmezo": "fedloom.algorithms.low_traffic.fedmezo:FedMeZO",
        "decomfl": "fedloom.algorithms.low_traffic.decomfl:DeComFL",
        "ferret": "fedloom.algorithms.low_traffic.ferret:Ferret",
        "fedavg_outer": "fedloom.algorithms.offsite.fedavg_outer:FedAvgOuter",
        "fedot": "fedloom.algorithms.offsite.fedot:FedOT",
        "fedbiot": "fedloom.algorithms.offsite.fedbiot:FedBiOT",
    },
    "fedloom.algorithms.base:Algorithm",
)


corpora = Registry(
    "corpus",
    "corpora",
    {
        "fed-skills": "fedloom.data.corpora.skills:SOURCE",
        "fed-gsm-symbolic": "fedloom.data.corpora.gsm_symbolic:SOURCE",
        "fed-medmcqa": "fedloom.data.corpora.medmcqa:SOURCE",
        "fed-dolly": "fedloom.data.corpora.dolly:SOURCE",
        "fed-gsm8k": "fedloom.data.corpora.gsm8k:SOURCE",
        "fed-gsm8k-3": "fedloom.data.corpora.gsm8k:SOURCE",
        "fed-codealpaca": "fedloom.data.corpora.codealpaca:SOURCE",
        "fed-alpaca": "fedloom.data.corpora.alpaca:SOURCE",
        "fed-codesearchnet": "fedloom.data.corpora.codesearchnet:SOURCE",
        "fed-preferences": "fedloom.data.corpora.preferences:SOURCE",
    },
    "fedloom.data.source:Source",
    instance=True,
)


splitters = Registry(
    "splitter",
    "splitters",
    {
        "uniform": "fedloom.data.splitters:uniform",
        "dirichlet": "fedloom.data.splitters:dirichlet",
        "meta": "fedloom.data.splitters:meta",
        "natural": "fedloom.data.skewed:natural",
        "quantity": "fedloom.data.skewed:quantity",
        "shards": "fedloom.data.skewed:shards",
    },
)


suites = Registry(
    "suite",
    "suites",
    {
        "skills": "fedloom.evaluation.suites:SKILLS",
        "gsm": "fedloom.evaluation.suites:GSM",
        "multiple-choice": "fedloom.evaluation.suites:MULTIPLE_CHOICE",
    },
    "fedloom.evaluation.suites:Suite",
    instance=True,
)


#: Suites of lm-eval tasks, which `fedloom evaluate --suite` measures once; `suites` are measured every round.
task_suites = Registry(
    "suite",
    "task_suites",
    {
        "gsm8k": "fedloom.evaluation.public.suites:GSM8K",
        "humaneval": "fedloom.evaluation.public.suites:HUMANEVAL",
        "humaneval-drawn": "fedloom.evaluation.public.suites:HUMANEVAL_DRAWN",
        "humaneval-x": "fedloom.evaluation.public.suites:HUMANEVAL_X",
        "humaneval-x-drawn": "fedloom.evaluation.public.suites:HUMANEVAL_X_DRAWN",
        "mmlu": "fedloom.evaluation.public.suites:MMLU",
        "medmcqa": "fedloom.evaluation.public.suites:MEDMCQA",
        "helm-mini": "fedloom.evaluation.public.suites:HELM_MINI",
    },
    "fedloom.evaluation.public.suites:TaskSuite",
    instance=True,
)


runtimes = Registry(
    "runtime",
    "runtimes",
    {
        "simulator": "fedloom.runtimes.simulator:Simulator",
        "distributed": "fedloom.experiment.local_federation:LocalFederation",
        "ray": "fedloom.runtimes.ray:Ray",
    },
    "fedloom.federation.runtime:Runtime",
)


operators = Registry(
    "operator",
    "operators",
    {
        "cast": "fedloom.messages.operators.cast:Cast",
        "bf16": "fedloom.messages.operators.cast:Bf16",
        "fp16": "fedloom.messages.operators.cast:Fp16",
        "quantize": "fedloom.messages.operators.quantize:Quantize",
        "sparsify": "fedloom.messages.operators.sparsify:Sparsify",
        "delta": "fedloom.messages.operators.delta:Delta",
        "deflate": "fedloom.messages.operators.compress:Deflate",
        "gzip": "fedloom.messages.operators.compress:Gzip",
        "zstd": "fedloom.messages.operators.compress:Zstd",
        "lz4": "fedloom.messages.operators.compress:Lz4",
    },
    "fedloom.messages.operators.base:Operator",
)


hooks = Registry(
    "hook",
    "hooks",
    {
        "early_stopping": "fedloom.federation.hooks.early_stopping:EarlyStopping",
        "ema": "fedloom.federation.hooks.ema:Ema",
        "gradient_noise": "fedloom.federation.hooks.gradient_noise:GradientNoise",
        "validation_loss": "fedloom.federation.hooks.validation_loss:ValidationLoss",
    },
    "fedloom.federation.hooks.base:Hook",
)


def notes() -> list[str]:
    """What the user should know of all the names that were asked for, each sentence once in a process."""
    return [
        note
        for table in (algorithms, corpora, splitters, suites, task_suites, runtimes, operators, hooks)
        for note in table.take_notes()
    ]
