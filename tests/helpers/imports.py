"""What imports what in a tree of Python files, read from the code without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path


class Source:
    """A package's files. `root` is its folder, as `.../fedloom`; imports are read inside functions too."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = sorted(root.rglob("*.py"))
        self._parsed: dict[Path, ast.Module] = {}
        self._imported: dict[Path, list[tuple[str, int]]] = {}

    def parsed(self, path: Path) -> ast.Module:
        if path not in self._parsed:
            self._parsed[path] = ast.parse(path.read_text(encoding="utf-8"))
        return self._parsed[path]

    def name(self, path: Path) -> str:
        """messages/wire.py"""
        return path.relative_to(self.root).as_posix()

    def module(self, path: Path) -> str:
        """fedloom.messages.wire; a package's `__init__` has the package's name."""
        parts = [self.root.name, *path.relative_to(self.root).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def modules(self) -> dict[str, Path]:
        return {self.module(path): path for path in self.files}

    def imported(self, path: Path) -> list[tuple[str, int]]:
        """(module, line) of every import; those under `if TYPE_CHECKING` do not count, for nothing runs them.

        `from a import b` is an import of `a.b` where that is a module of this tree, and of `a` where it is not.
        """
        if path not in self._imported:
            self._imported[path] = list(self._read(path))
        return self._imported[path]

    def _read(self, path: Path) -> Iterator[tuple[str, int]]:
        tree = self.parsed(path)
        skipped: set[ast.AST] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                skipped.update(inner for statement in node.body for inner in ast.walk(statement))
            if node in skipped:
                continue
            if isinstance(node, ast.Import):
                yield from ((alias.name, node.lineno) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{self.name(path)}:{node.lineno} imports relatively"
                assert node.module
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                found = dict.fromkeys(name if name in self.modules else node.module for name in inner)
                yield from ((name, node.lineno) for name in found)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
                (target, *_) = node.args
                if isinstance(target, ast.Constant):
                    yield target.value, node.lineno

    def part(self, module: str) -> str:
        """fedloom.data.hub → data; fedloom itself → fedloom."""
        pieces = module.split(".")
        return pieces[1] if len(pieces) > 1 else pieces[0]

    def misplaced(self, path: Path, layers: Sequence[set[str]]) -> list[str]:
        """The file's imports from a layer above its own, or from another part of its own layer."""
        level = {part: number for number, parts in enumerate(layers) for part in parts}
        own = self.part(self.module(path))
        found = []
        for module, line in self.imported(path):
            part = self.part(module)
            if module.split(".")[0] != self.root.name or part == own or own not in level:
                continue
            if part not in level or level[part] >= level[own]:
                found.append(f"line {line}: {module}")
        return found

    def circles(self) -> list[list[str]]:
        """Modules that import each other in a circle; each circle once, as a way from a module back to itself."""
        graph = {
            module: {target for target, _ in self.imported(path) if target in self.modules and target != module}
            for module, path in self.modules.items()
        }
        return [_way(graph, group) for group in _groups(graph) if len(group) > 1]


def _groups(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of a graph, by who is reached from whom and back."""
    reached = {start: _reach(graph, start) for start in graph}
    groups: list[set[str]] = []
    for module in sorted(graph):
        if not any(module in group for group in groups):
            groups.append({other for other in reached[module] if module in reached[other]} | {module})
    return groups


def _reach(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for other in graph[todo.pop()] - seen:
            seen.add(other)
            todo.append(other)
    return seen


def _way(graph: Mapping[str, set[str]], group: set[str]) -> list[str]:
    """The shortest way within the group from its first module back to it."""
    first = min(group)
    ways, seen = [[first]], {first}
    for way in ways:
        if first in graph[way[-1]]:
            return [*way, first]
        new = sorted((graph[way[-1]] & group) - seen)
        seen.update(new)
        ways += [[*way, other] for other in new]
    raise AssertionError(f"no circle in {sorted(group)}")
