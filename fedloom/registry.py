"""One lazy name table for each extension point, open to other packages through entry points.

A name maps to ``module:attribute``, imported on first use, so that listing algorithms does not import torch models. A
package adds names under an entry-point group (``fedloom.algorithms``, ``fedloom.corpora`` …); Python code adds them
with `register`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from fedloom.errors import UserError, suggest


class Registry:
    """Names of one kind. `kind` is the noun used in messages, `group` the entry-point group after ``fedloom.``."""

    def __init__(self, kind: str, group: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self.group = group
        self._targets: dict[str, Any] = dict(builtin)
        self._scanned = False

    def register(self, name: str, target: Any) -> None:
        """Add or replace `name`. `target` is the object itself or ``module:attribute``."""
        self._targets[name] = target

    def registered(self, name: str) -> Callable[[Any], Any]:
        """`register` as a decorator."""

        def add(target: Any) -> Any:
            self.register(name, target)
            return target

        return add

    def names(self) -> list[str]:
        self._scan()
        return sorted(self._targets)

    def __contains__(self, name: str) -> bool:
        self._scan()
        return name in self._targets

    def get(self, name: str) -> Any:
        """The object behind `name`. Raises UserError with the nearest name where there is none."""
        self._scan()
        if name not in self._targets:
            raise UserError(f"unknown {self.kind} {name!r}: {suggest(name, self._targets)}")
        target = self._targets[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = getattr(import_module(module), attribute)
            self._targets[name] = target
        return target

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        for point in entry_points(group=f"fedloom.{self.group}"):
            self._targets.setdefault(point.name, point.value)


algorithms = Registry(
    "algorithm",
    "algorithms",
    {
        "fedavg": "fedloom.algorithms.fedavg:FedAvg",
        "local": "fedloom.algorithms.baselines:Local",
        "global": "fedloom.algorithms.baselines:Global",
        "fedit": "fedloom.algorithms.fedit:FedIT",
        "ffa_lora": "fedloom.algorithms.ffa_lora:FFALoRA",
        "flora": "fedloom.algorithms.flora:FLoRA",
        "flexlora": "fedloom.algorithms.flexlora:FlexLoRA",
        "hetlora": "fedloom.algorithms.hetlora:HetLoRA",
        "fedsa_lora": "fedloom.algorithms.fedsa_lora:FedSALoRA",
        "rolora": "fedloom.algorithms.rolora:RoLoRA",
        "fedex_lora": "fedloom.algorithms.fedex_lora:FedExLoRA",
        "lora_fair": "fedloom.algorithms.lora_fair:LoRAFAIR",
        "fed_sb": "fedloom.algorithms.fed_sb:FedSB",
        "fedsvd": "fedloom.algorithms.fedsvd:FedSVD",
        "fedrot_lora": "fedloom.algorithms.fedrot_lora:FedRotLoRA",
        "slora": "fedloom.algorithms.slora:SLoRA",
        "fedprox": "fedloom.algorithms.fedprox:FedProx",
        "scaffold": "fedloom.algorithms.scaffold:Scaffold",
        "fedavgm": "fedloom.algorithms.fedopt:FedAvgM",
        "fedadagrad": "fedloom.algorithms.fedopt:FedAdagrad",
        "fedadam": "fedloom.algorithms.fedopt:FedAdam",
        "fedyogi": "fedloom.algorithms.fedopt:FedYogi",
        "diloco": "fedloom.algorithms.diloco:DiLoCo",
        "median": "fedloom.algorithms.robust:Median",
        "trimmed_mean": "fedloom.algorithms.robust:TrimmedMean",
        "krum": "fedloom.algorithms.krum:Krum",
        "geometric_median": "fedloom.algorithms.geometric_median:GeometricMedian",
        "norm_bound": "fedloom.algorithms.norm_bound:NormBound",
        "pfedme": "fedloom.algorithms.pfedme:PFedMe",
        "ditto": "fedloom.algorithms.ditto:Ditto",
        "fedper": "fedloom.algorithms.fedper:FedPer",
        "fedrep": "fedloom.algorithms.fedrep:FedRep",
        "feddpa": "fedloom.algorithms.feddpa:FedDPA",
        "fedkseed": "fedloom.algorithms.fedkseed:FedKSeed",
        "fedmezo": "fedloom.algorithms.fedmezo:FedMeZO",
        "decomfl": "fedloom.algorithms.decomfl:DeComFL",
        "ferret": "fedloom.algorithms.ferret:Ferret",
    },
)

corpora = Registry(
    "corpus",
    "corpora",
    {
        "fed-skills": "fedloom.corpora.skills:SOURCE",
        "fed-gsm-symbolic": "fedloom.corpora.gsm_symbolic:SOURCE",
        "fed-medmcqa": "fedloom.corpora.medmcqa:SOURCE",
        "fed-dolly": "fedloom.corpora.dolly:SOURCE",
        "fed-gsm8k": "fedloom.corpora.gsm8k:SOURCE",
        "fed-gsm8k-3": "fedloom.corpora.gsm8k:SOURCE",
        "fed-codealpaca": "fedloom.corpora.codealpaca:SOURCE",
    },
)

splitters = Registry(
    "splitter",
    "splitters",
    {
        "uniform": "fedloom.data.splitters:uniform",
        "dirichlet": "fedloom.data.splitters:dirichlet",
        "meta": "fedloom.data.splitters:meta",
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
)

runtimes = Registry(
    "runtime",
    "runtimes",
    {
        "simulator": "fedloom.runtimes.simulator:Simulator",
        "distributed": "fedloom.runtimes.distributed:Distributed",
    },
)

#: Runtimes whose clients are not in this process: what runs a whole recipe under them, with `experiment.run`'s arguments.
drivers = Registry("runtime", "drivers", {"distributed": "fedloom.federation:run_here"})
