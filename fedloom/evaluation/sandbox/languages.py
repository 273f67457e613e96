"""Build a program from a model's answer in each language of HumanEval and HumanEval-X, and decide whether it passed.

A program is the task's prompt, the answer, and the task's tests. A failed test ends it with an error. Where the language
allows code after the tests, the program prints a random closing word there: an answer that exits before the tests has
not passed. This file does not know how programs are run (execution.py), models or scores.

HumanEval: arXiv 2107.03374. HumanEval-X: arXiv 2303.17568. The order of the parts is theirs.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.common.errors import UserError, suggest
from fedloom.evaluation.sandbox.programs import PYTHON, SCRATCH, SOURCES, Limits, Outcome, Program, Sandbox

#: One record of a data file: HumanEval's or HumanEval-X's own keys.
Record = Mapping[str, Any]


#: Headers that answers may use without including them, as in HumanEval-X's own runner.
_CPP_HEADERS = (
    "stdlib.h", "algorithm", "math.h", "stdio.h", "vector", "string", "climits", "cstring", "iostream", "map", "set",
    "cassert",
)  # fmt: skip


#: JavaScript's own console.assert only prints.
_JAVASCRIPT_ASSERT = (
    "console.assert = (held, ...said) => { if (!held) throw new Error('a test failed: ' + said.join(' ')) };\n"
)


#: The package that one of HumanEval-X's JavaScript prompts requires.
_MD5 = "const { createHash } = require('crypto');\n"


_MD5 += "module.exports = (text) => createHash('md5').update(text).digest('hex');\n"


#: The two names that HumanEval-X's Go tests use, so that no package has to be fetched.
_TESTIFY = """package assert

import (
\t"bytes"
\t"reflect"
\t"testing"
)

type Assertions struct{ t *testing.T }

func New(t *testing.T) *Assertions { return &Assertions{t} }

func (a *Assertions) Equal(expected, actual interface{}, _ ...interface{}) bool {
\tif left, ok := expected.([]byte); ok {
\t\tif right, ok := actual.([]byte); ok && left != nil && right != nil && bytes.Equal(left, right) {
\t\t\treturn true
\t\t}
\t}
\tif reflect.DeepEqual(expected, actual) {
\t\treturn true
\t}
\ta.t.Errorf("expected %v, got %v", expected, actual)
\treturn false
}
"""


#: Packages that an answer in Go may use without importing them.
_GO_PACKAGES = (
    "bytes", "crypto/md5", "fmt", "math", "math/rand", "regexp", "sort", "strconv", "strings", "time", "unicode",
)  # fmt: skip


_GO_MODULE = """module humaneval

go 1.18

require github.com/stretchr/testify v0.0.0

replace github.com/stretchr/testify => ./testify
"""


@dataclass(frozen=True)
class Language:
    """One programming language.

    Attributes:
        name: as in HumanEval-X's file names.
        tools: the programs that have to be installed.
        build: (record, answer, closing word) → the program.
        closes: whether the program prints the closing word after its tests.
    """

    name: str
    tools: tuple[str, ...]
    build: Callable[[Record, str, str], Program]
    closes: bool

    def missing(self) -> list[str]:
        """Return the tools that are not installed."""
        return [tool for tool in self.tools if shutil.which(tool) is None]

    def program(self, record: Record, answer: str) -> tuple[Program, Callable[[Outcome], bool]]:
        """Return the program of an answer, and a function: its outcome → whether the answer passed."""
        word = f"all-tests-passed-{secrets.token_hex(8)}"

        def passed(ran: Outcome) -> bool:
            return ran.succeeded and (not self.closes or ran.output.rstrip().endswith(word))

        return self.build(record, answer, word), passed


def language(name: str) -> Language:
    """Return the language of that name. Raises UserError where it is unknown or its tools are not installed."""
    if name not in LANGUAGES:
        raise UserError(f"unknown language {name!r}: {suggest(name, sorted(LANGUAGES))}")
    found = LANGUAGES[name]
    missing = found.missing()
    if missing:
        raise UserError(
            f"{name} programs need {' and '.join(missing)}, not found here: install it, or leave {name} out"
        )
    return found


def check_runs(sandbox: Sandbox, records: Sequence[Record]) -> None:
    """Raise UserError where programs of these records' language do not run in the sandbox.

    The sandbox may have other tools than this machine. The reference answers of the first records are run. One that
    passes is enough, because some reference answers of these data sets do not pass.
    """
    ran = None
    for record in [r for r in records if r.get("canonical_solution")][:3]:
        found = language(language_of(record["task_id"]))
        program, passed = found.program(record, record["canonical_solution"])
        ran = sandbox.run(program)
        if passed(ran):
            return
    if ran is not None:
        said = " ".join(ran.output.split())[-200:] or f"it ended by {ran.end}"
        raise UserError(
            f"{found.name} programs do not run in the sandbox here ({sandbox.name}): the right answer to "
            f"{record['task_id']} did not pass ({said}): install {' and '.join(found.tools or ('python3',))} "
            f"{sandbox.tools_at}, or leave {found.name} out"
        )


def language_of(task_id: str) -> str:
    """Return the language of a record: ``HumanEval/3`` and ``Python/3`` are Python, ``CPP/3`` is C++ …"""
    kind = task_id.partition("/")[0].lower()
    return {"humaneval": "python", "javascript": "js"}.get(kind, kind)


def _python(record: Record, answer: str, word: str) -> Program:
    check = f"check({record['entry_point']})\n" if "entry_point" in record else ""
    source = f"{record['prompt']}{answer}\n{record['test']}\n{check}print({word!r})\n"
    return Program({"main.py": source}, [PYTHON, "-B", f"{SOURCES}/main.py"], Limits(seconds=10.0))


def _javascript(record: Record, answer: str, word: str) -> Program:
    source = f"{_JAVASCRIPT_ASSERT}{record['prompt']}{answer}\n{record['test']}\nconsole.log({word!r})\n"
    command = ["node", "--max-old-space-size=256", f"{SOURCES}/main.js"]
    return Program({"main.js": source, "node_modules/js-md5/index.js": _MD5}, command, Limits(seconds=10.0))


def _cpp(record: Record, answer: str, word: str) -> Program:
    headers = "".join(f"#include<{name}>\n" for name in _CPP_HEADERS)
    source = f"{headers}using namespace std;\n{record['prompt']}{answer}\n{record['test']}\n"
    libraries = "-lcrypto" if "openssl/" in source else ""
    steps = f"g++ -std=c++17 -w -O1 {SOURCES}/main.cpp -o {SCRATCH}/main {libraries} && {SCRATCH}/main"
    return Program({"main.cpp": source}, ["sh", "-c", steps], Limits(seconds=30.0))


def _java(record: Record, answer: str, word: str) -> Program:
    source = f"{record['prompt']}{answer}\n{record['test']}\n"
    small = "-Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1"
    compiled = " ".join(f"-J{option}" for option in small.split())
    steps = f"javac {compiled} -nowarn -d {SCRATCH} {SOURCES}/Main.java && java {small} -cp {SCRATCH} Main"
    return Program({"Main.java": source}, ["sh", "-c", steps], Limits(seconds=40.0, memory=2 << 30))


def _go(record: Record, answer: str, word: str) -> Program:
    """Build a Go program. Go rejects double and unused imports, so only the packages that the function uses are added."""
    setup = str(record["test_setup"])
    function = str(record["prompt"]).replace(str(record["import"]), "", 1) + answer
    used = [
        path
        for path in _GO_PACKAGES
        if f'"{path}"' not in setup and re.search(rf"\b{path.rpartition('/')[2]}\.", function)
    ]
    imports = "".join(f'import "{path}"\n' for path in used)
    files = {
        "main_test.go": f"{setup}\n{imports}\n{function}\n{record['test']}\n",
        "go.mod": _GO_MODULE,
        "testify/go.mod": "module github.com/stretchr/testify\n\ngo 1.18\n",
        "testify/assert/assert.go": _TESTIFY,
    }
    settings = (
        f"GOCACHE={SCRATCH}/cache GOPATH={SCRATCH}/go GOFLAGS=-mod=mod GOPROXY=off GOTOOLCHAIN=local GOMAXPROCS=2"
    )
    steps = f"cp -r {SOURCES} {SCRATCH}/here && cd {SCRATCH}/here && env {settings} go test -vet=off -count=1 ."
    return Program(files, ["sh", "-c", steps], Limits(seconds=60.0, memory=2 << 30, scratch=512 << 20))


LANGUAGES = {
    "python": Language("python", (), _python, closes=True),
    "js": Language("js", ("node",), _javascript, closes=True),
    "cpp": Language("cpp", ("g++",), _cpp, closes=False),
    "java": Language("java", ("javac", "java"), _java, closes=False),
    "go": Language("go", ("go",), _go, closes=False),
}


#: A comment, a string or a character literal: braces in these do not count.
_NO_BRACES = re.compile(r"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`[^`]*`""", re.DOTALL)


def trim_answer(record: Record, answer: str) -> str:
    """Cut the answer after the requested function: the model may have written more.

    In languages with braces, everything after the function's last brace is removed, and braces that were open around
    it (Java's class) are closed. An answer that never closes its function is unchanged. In Python the task's stop words
    do this.
    """
    if language_of(str(record["task_id"])) == "python":
        return answer
    depth = around = _braces(str(record["prompt"]))
    around -= 1
    skipped = {i for found in _NO_BRACES.finditer(answer) for i in range(*found.span())}
    for i, sign in enumerate(answer):
        if sign in "{}" and i not in skipped:
            depth += 1 if sign == "{" else -1
            if depth == around:
                return answer[: i + 1] + "\n}" * around + "\n"
    return answer


def _braces(text: str) -> int:
    """Return how many braces are open at the end of `text`."""
    bare = _NO_BRACES.sub("", text)
    return bare.count("{") - bare.count("}")
