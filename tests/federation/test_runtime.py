"""The contract of runtimes: what each registered one declares, and that nothing is asked of them behind its back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fedloom
from fedloom.common import registry
from fedloom.common.errors import UserError
from fedloom.federation.runtime import Capabilities, Runtime


@pytest.mark.parametrize("name", registry.runtimes.names())
def test_a_runtime_declares_what_it_can_do_and_can_be_opened_or_conducts(name):
    runtime = registry.runtimes.get(name)
    assert issubclass(runtime, Runtime)
    assert isinstance(runtime.capabilities, Capabilities)
    opens = runtime.open.__func__ is not Runtime.open.__func__
    conducts = runtime.conduct.__func__ is not Runtime.conduct.__func__
    assert (opens, conducts) == (not runtime.capabilities.conducts, runtime.capabilities.conducts)


def test_what_is_no_runtime_is_refused(monkeypatch):
    monkeypatch.setitem(registry.runtimes._targets, "mine", lambda client, clients: None)
    with pytest.raises(UserError, match="'mine' is a function, not a subclass of Runtime"):
        registry.runtimes.get("mine")


def test_a_runtime_that_leaves_something_out_is_refused(monkeypatch):
    class Silent(Runtime):
        clients = ()

        def close(self):
            pass

    monkeypatch.setitem(registry.runtimes._targets, "mine", Silent)
    with pytest.raises(UserError, match="does not say run: write that method"):
        registry.runtimes.get("mine")


def test_one_that_is_not_opened_by_name_says_so(tmp_path):
    class Silent(Runtime):
        clients = ()

        def run(self, assignments):
            return iter(())

        def close(self):
            pass

    with pytest.raises(NotImplementedError, match="Silent is not opened by name"):
        Silent.open(None, None, tmp_path, lambda: None)
    with pytest.raises(NotImplementedError, match="Silent has no processes that conduct a run"):
        Silent.conduct(None, tmp_path, False, False, None)


def test_no_runtime_is_asked_for_an_attribute_that_it_may_not_have():
    """`getattr(runtime, name, default)` would hide a misspelt name; `capabilities` has a default for each."""
    asked = []
    for path in Path(fedloom.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) == 3:
                subject = ast.unparse(node.args[0])
                asked += [f"{path.name}:{node.lineno}"] if "runtime" in subject else []
    assert not asked
