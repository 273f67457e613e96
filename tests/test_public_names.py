"""The Python API: its names, and that what its docstring shows can be done."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import fedloom

NAMES = ["Algorithm", "Hook", "Recipe", "Result", "RunFailed", "UserError", "__version__", "run"]


def test_the_public_names_are_these():
    assert sorted(fedloom.__all__) == NAMES
    assert dir(fedloom) == NAMES
    for name in NAMES:
        assert getattr(fedloom, name) is not None
    scope: dict[str, object] = {}
    exec("from fedloom import *", scope)
    assert set(NAMES) <= set(scope)


def test_each_name_is_the_object_where_it_lives():
    for name, module in fedloom._PUBLIC.items():
        assert getattr(fedloom, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = fedloom.train


def test_the_version_is_the_packages():
    assert fedloom.__version__ == version("fedloom")


def test_importing_fedloom_does_not_import_torch():
    """`fedloom --help` should not wait for it, and the settings that torch reads must come first."""
    code = "import sys, fedloom, fedloom.cli.runs; print('torch' in sys.modules, fedloom.common.environment.late_settings())"
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
