"""Phrases that readers had to read twice stay out of messages, docstrings, comments, pages and recipes.

CONTRIBUTING.md ("Words") has the manner, `PHRASES` what a program can find of it. `words_allowed.txt` lists the files that
still have such phrases. It may only shrink: a file that is clean has to leave it.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = (Path(__file__).parent / "words_allowed.txt").read_text(encoding="utf-8").split()

#: Phrase → what to write.
PHRASES = {
    r"mend(s|ed|ing)?": "fix, how to fix it",
    r"be had": "is available; cannot be used with",
    r"what (it|he|they|each|everybody|a client|the client|clients|the clients|a site|sites) holds?": "the client's own data",
    r"(let|lets|letting) through": "accept; reject",
    r"(tell|tells|telling|told) (of|once|about)": "report, log",
    r"numbers told": "metrics",
    r"rests": "is kept, stored or saved in",
    r"(come|comes|came|coming) by": "collect",
    r"gather(s|ed|ing)? (the |a round's |its |all )?updates": "collect updates",
    r"who is asked(?! for)": "the schedule; which clients are sampled",
    r"(a|the|each) client's turn": "local training",
    r"for want of": "because … is missing",
    r"carr(y|ies|ied|ying) on": "continue, resume",
    r"anew": "again, a second time",
    r"of (ours|yours|theirs)": "our own, your own, their own",
    r"of unlike": "different",
    r"(shared|shares|sharing|dealt|deals) out": "divide, distribute",
    r"(turn and turn about|by turns)": "alternately",
    r"as ever": "as always, unchanged",
    r"but for": "except for",
    r"at hand": "available",
    r"untried": "not tested",
    r"says? (nothing |something )?of (itself|themselves|its)": "describe, declare",
    r"stands?(?!-| for| alone)": "is in; is",
    r"cage[ds]?": "sandbox",
    r"(is|are|was|were|be|been|being) told": "get, receive; report",
    r"(go|goes|going|went) on": "continue",
    r"alike": "equal, the same way",
    r"besides": "also, in addition",
    r"whom": "a second sentence",
    r"for good": "permanently",
    r"afresh": "again",
    r"worked out": "compute",
    r"(let|lets) in": "accept",
    r"asked again": "get the work again",
    r"held to": "checked against, compared with",
    r"(in|with) (a|one) (plain )?sentence": "with an error message",
    r"(the house|house rule)": "the project, the code",
    r"by way of": "through",
    r"without a word": "silently, without an error",
    r"(looks|look|looked) that": "check that",
    r"is quicker|as quick": "is faster, as fast",
}  # fmt: skip
BANNED = re.compile(rf"\b(?:{'|'.join(PHRASES)})\b", re.IGNORECASE)


def pages() -> list[Path]:
    """Everything that people read: pages, recipes, and whatever in fedloom/ has words in it."""
    docs = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"]
    more = [*(ROOT / ".github").rglob("*.md"), *(ROOT / "recipes").glob("*.yaml"), ROOT / "docs" / "generate.py"]
    code = [p for p in (ROOT / "fedloom").rglob("*") if p.suffix in {".py", ".yaml", ".html", ".js"}]
    return sorted(p for p in {*docs, *more, *code} if "__pycache__" not in p.parts)


def words(name: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of whatever a reader or a user sees: of code its strings and comments, of a changelog the newest section."""
    if name.endswith(".py"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.lineno, node.value
        block: list[tokenize.TokenInfo] = []  # comments on neighbouring lines: a phrase may run over a line's end
        for token in (t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT):
            if block and token.start[0] != block[-1].start[0] + 1:
                yield block[0].start[0], "\n".join(t.string.lstrip("#: ") for t in block)
                block = []
            block.append(token)
        if block:
            yield block[0].start[0], "\n".join(t.string.lstrip("#: ") for t in block)
    elif name == "CHANGELOG.md":
        yield 1, "\n## ".join(text.split("\n## ")[:2])
    else:
        yield 1, text


def found(name: str, text: str) -> list[str]:
    """The banned phrases of a file, each with its line and what to write in its place."""
    faults = set()
    for start, said in words(name, text):
        plain = re.sub(r"[ \t]*\n[ \t]*(#[ \t]*)?(?=\S)", "\n", said)  # a phrase over two lines, of a YAML comment too
        for match in BANNED.finditer(re.sub(r"(?<!\n)\n(?!\n)", " ", plain)):
            line = start + plain.count("\n", 0, match.start())
            phrase = next(p for p in PHRASES if re.fullmatch(p, match[0], re.IGNORECASE))
            faults.add(f"{name}:{line}: {match[0]!r}, write: {PHRASES[phrase]}")
    return sorted(faults)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_file_has_a_banned_phrase():
    faults = {relative(path): found(relative(path), path.read_text(encoding="utf-8")) for path in pages()}
    bad = [fault for name, list_ in faults.items() if name not in ALLOWED for fault in list_]
    assert not bad, "\n".join(bad)
    clean = [name for name in ALLOWED if not faults.get(name)]
    assert not clean, f"clean now, remove from tests/words_allowed.txt: {', '.join(clean)}"


def test_every_allowed_file_exists_once_and_in_order():
    assert [name for name in ALLOWED if not (ROOT / name).is_file()] == []
    assert sorted(set(ALLOWED)) == ALLOWED


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("page.md", "# Title\n\nThe\nmend is easy.\n", 4),
        ("page.md", "Nothing is\nto be\nhad here.", 2),
        ("recipe.yaml", "# how long: what\n# it holds\nname: x", 1),
        ("code.py", 'def f():\n    raise ValueError("name the mend")\n', 2),
        ("code.py", 'def f(x):\n    raise ValueError(f"{x} cannot be had with {x}")\n', 2),
        ("code.py", '"""A docstring.\n\nIt is told of once more.\n"""\n', 3),
        ("code.py", "x = 1  # what rests here\n", 1),
        ("code.py", "# where it is carried\n# on again\nx = 1\n", 1),
        ("CHANGELOG.md", "# Changelog\n\n## 2\n\n- Mended: x.\n\n## 1\n", 5),
    ],
)
def test_a_banned_phrase_is_found(name, text, line):
    (fault,) = found(name, text)
    assert fault.startswith(f"{name}:{line}: "), fault


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.md", "Amend the recommendation; the rest is had."),
        ("code.py", "mends = 1\n"),
        ("CHANGELOG.md", "# Changelog\n\n## 2\n\n- Fixed: x.\n\n## 1\n\n- Mended: y.\n"),
    ],
)
def test_other_words_are_left_alone(name, text):
    assert found(name, text) == []
