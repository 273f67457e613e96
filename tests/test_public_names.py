"""The Python API: its names, package by package, and that what its docstring shows can be done."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import fedloom

ROOT = Path(fedloom.__file__).parent

#: What each package offers to other people's code. A name that is taken away breaks their packages.
FACES = {
    "fedloom": "Algorithm Hook Recipe Result RunFailed UserError __version__ run",
    "fedloom.algorithms": "ANY_PARALLEL About Algorithm AlgorithmOptions Deployed FedAvg Properties Sizes nothing whole",
    "fedloom.common": "ClientFailed RunFailed UserError numpy_generator torch_generator",
    "fedloom.data": "Batch Corpus Example Grouping HubRef Partition Request Rows Shard Source",
    "fedloom.evaluation": "Suite TaskSuite",
    "fedloom.federation": "Fit Hook HookOptions Pass ServerRound Step Watch",
    "fedloom.messages": "Around BadPayload CannotEncode Cost Failure Operator OperatorOptions Part Payload Update",
    "fedloom.models": "AdaptedModel Adapter Layout Models WeightedMean",
    "fedloom.recipe": "AdapterConfig ModelConfig Recipe SplitConfig TrainConfig",
    "fedloom.testing": "ContractBroken Report check_algorithm",
    "fedloom.training": "FitResult LocalRun",
}


@pytest.mark.parametrize("face", FACES)
def test_the_public_names_are_these(face):
    module, names = importlib.import_module(face), FACES[face].split()
    assert sorted(module.__all__) == sorted(names)
    assert dir(module) == sorted(names)
    scope: dict[str, object] = {}
    exec(f"from {face} import *", scope)
    assert set(names) <= set(scope)
    for name in set(names) - {"__version__"}:
        made_in = getattr(scope[name], "__module__", face)
        assert made_in.startswith(face) or face == "fedloom", (
            f"{name} is {made_in}'s, a package's face has its own names"
        )
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = module.nothing_of_the_kind


@pytest.mark.parametrize("face", FACES)
def test_type_checkers_are_shown_the_same_names(face):
    path = ROOT.joinpath(*face.split(".")[1:], "__init__.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    shown = {a.asname: (n.module, a.name) for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    shown.pop("registry", None)  # a module
    assert sorted({*shown, *({"__version__"} if face == "fedloom" else ())}) == sorted(FACES[face].split())
    for name, (module, defined) in shown.items():
        assert name == defined
        assert getattr(importlib.import_module(face), name) is getattr(importlib.import_module(str(module)), name)


def test_fedlooms_own_code_imports_from_where_a_name_is_defined():
    """Faces are for others: an import from one would hide which file needs which."""
    found = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in FACES:
                names = {a.name for a in node.names} & set(FACES[str(node.module)].split())
                found += [f"{path.relative_to(ROOT)}:{node.lineno} {n}" for n in names]
    assert not found


def test_the_version_is_the_packages():
    assert fedloom.__version__ == version("fedloom")


def test_importing_fedloom_or_a_face_does_not_import_torch():
    """`fedloom --help` should not wait for it, and the settings that torch reads must come first."""
    code = f"import sys, fedloom, fedloom.cli.runs, {', '.join(FACES)}; "
    code += "print('torch' in sys.modules, fedloom.common.environment.late_settings())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False []"


@pytest.mark.parametrize("packing", ["on", "off"])
def test_a_results_model_can_be_used(tiny_recipe, tmp_path, packing):
    """`result.model.generate(...)`, as the docstring of Result says, whatever attention the training used."""
    result = fedloom.run(tiny_recipe({"train.packing": packing}), out=tmp_path / "run")
    assert result.folder == tmp_path / "run"
    assert result.report.is_file()
    assert result.summary["loss"]["after"] < result.summary["loss"]["before"]
    asked = result.tokenizer(["copy: ant bee", "upper: cow"], padding=True, return_tensors="pt")
    answer = result.model.generate(**asked, max_new_tokens=3, do_sample=False)
    assert answer.shape == (2, asked["input_ids"].shape[1] + 3)
    with torch.no_grad():
        alone = result.model(**result.tokenizer(["upper: cow"], return_tensors="pt")).logits[0, -1]
        padded = result.model(**asked).logits[1, -1]
    assert torch.allclose(alone, padded, atol=1e-4)
