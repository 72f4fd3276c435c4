"""Figures of the house: `python tests/house.py [ROOT]` prints them for a checkout.

Imports count wherever they stand: at the top of a file, inside a function or for typing. Of a `from` import
each name counts, as the module that it is or that it stands in. How many files a batch passes on its way to
the loss is for `tests/walk.py`, which runs a step.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import io
import pathlib
import sys
import tokenize
import tomllib
from collections.abc import Iterator, Mapping

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("sharding", "models", "runtime")
LONGEST = 500
# Libraries that cost a process time or memory to import, so that only those who need them should.
HEAVY = frozenset(
    {
        *("jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "scipy", "pydantic", "yaml", "rich"),
        *("typer", "tensorstore", "tensorboardX", "tokenizers", "pyarrow", "safetensors", "libtpu"),
        *("flatbuffers", "pytest", "IPython", "plotly"),
    }
)
# Tokens that lay code out; comments and layout are free, a docstring is one token.
_LAYOUT = frozenset(
    {
        *(tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT),
        *(tokenize.ENDMARKER, tokenize.COMMENT),
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name: by whom, from where (`sharding.errors`, `jax.numpy`), and whether in a function."""

    importer: str
    imported: str
    line: int
    ours: bool
    inner: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class House:
    """The code of a checkout: file and syntax tree of every module, by name without `meshwright.`."""

    root: pathlib.Path
    files: Mapping[str, pathlib.Path]
    trees: Mapping[str, ast.Module]

    @classmethod
    def read(cls, root: pathlib.Path = ROOT) -> House:
        """Read every module under the packages' folders."""
        paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
        parts = [path.relative_to(root).with_suffix("").parts for path in paths]
        names = [".".join(part).removesuffix(".__init__") for part in parts]
        trees = [ast.parse(path.read_text("utf-8")) for path in paths]
        return cls(
            root=root,
            files=dict(zip(names, paths, strict=True)),
            trees=dict(zip(names, trees, strict=True)),
        )

    def resolve(self, name: str) -> str | None:
        """Return the module that a dotted name is or stands in; None if it is none of ours."""
        parts = name.split(".")
        known = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((part for part in known if part in self.files), None)

    def package_of(self, module: str) -> str:
        """Return the package whose folder holds a module's file."""
        return module if self.files[module].name == "__init__.py" else module.rpartition(".")[0]


def imports(house: House) -> Iterator[Import]:
    """Return every import of every module."""
    for module, tree in house.trees.items():
        for node, inner in _walk(tree, False):
            for name in _names(node, house.package_of(module)):
                ours = name.split(".")[0] in PACKAGES
                found = house.resolve(name) if ours else name
                if found is not None and found != module:
                    yield Import(importer=module, imported=found, line=node.lineno, ours=ours, inner=inner)


def _walk(node: ast.AST, inner: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inner
        yield from _walk(child, inner or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def _names(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Return the dotted names that an import asks for, ours without `meshwright.`."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif node.level:
        base = package.split(".")[: len(package.split(".")) - node.level + 1]
        names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
    else:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name.removeprefix("meshwright.") for name in names]


def circles(house: House) -> list[list[str]]:
    """Return the sets of modules that import one another, the largest first."""
    graph = collections.defaultdict(set)
    for one in imports(house):
        if one.ours:
            graph[one.importer].add(one.imported)
    reached = {module: _reached(graph, module) for module in house.files}
    groups = {
        frozenset(other for other in reached[module] if module in reached[other]) for module in house.files
    }
    return sorted((sorted(group) for group in groups if len(group) > 1), key=lambda g: (-len(g), g))


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found, ahead = {start}, [start]
    while ahead:
        for module in graph.get(ahead.pop(), ()):
            if module not in found:
                found.add(module)
                ahead.append(module)
    return found


@functools.cache
def rooms(root: pathlib.Path = ROOT) -> dict[str, int]:
    """Return the floor of each room of sharding, the lowest 0, from the contract in pyproject.toml."""
    settings = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "rooms")
    floors = enumerate(reversed(layers))
    return {name.strip(" ()"): floor for floor, layer in floors for name in layer.split(":")}


def lawful(importer: str, imported: str) -> bool:
    """Return whether the law lets one module import another.

    A door, which is the `__init__` of a package, is no room: what it offers is its package's.
    """
    mine, theirs = importer.split("."), imported.split(".")
    if mine[0] != theirs[0]:
        below = PACKAGES.index(mine[0]) > PACKAGES.index(theirs[0])
        return below and (mine[0] != "models" or theirs[:2] in (["sharding", "ops"], ["sharding", "errors"]))
    if mine[0] != "sharding" or len(mine) == 1:
        return True
    return len(theirs) > 1 and rooms()[mine[1]] >= rooms()[theirs[1]]


def tokens(text: str) -> int:
    """Return the tokens of a file without comments and layout; an f-string is one, whatever the Python."""
    start = getattr(tokenize, "FSTRING_START", None)
    end = getattr(tokenize, "FSTRING_END", None)
    count = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        depth -= token.type == end
        count += depth == 0 and token.type not in _LAYOUT and token.type != start
        depth += token.type == start
    return count


def inner_imports(house: House) -> list[Import]:
    """Return imports inside functions that are not of heavy libraries, outside the command line and doors."""
    return [
        one
        for one in imports(house)
        if one.inner
        and one.imported.split(".")[0] not in HEAVY
        and not one.importer.startswith("runtime.cli")
    ]


def duplicate_classes(house: House) -> dict[str, list[str]]:
    """Return each name that more than one class has, and the modules of these classes."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for module, tree in house.trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module)
    return {name: modules for name, modules in sorted(found.items()) if len(modules) > 1}


def loose_files(house: House) -> dict[str, list[str]]:
    """Return the modules that stand in a package itself, doors not counted."""
    loose = [name for name in house.files if name.count(".") == 1 and house.package_of(name) != name]
    return {package: [name for name in loose if name.split(".")[0] == package] for package in PACKAGES}


def figures(house: House) -> dict[str, object]:
    """Return what is counted, in the order in which it is printed."""
    texts = {path: path.read_text("utf-8") for path in house.files.values()}
    lines = {path: len(text.splitlines()) for path, text in texts.items()}
    long = [str(path.relative_to(house.root)) for path, count in lines.items() if count > LONGEST]
    against = [one for one in imports(house) if one.ours and not lawful(one.importer, one.imported)]
    loose = loose_files(house)
    return {
        "import circles (files in each)": [len(group) for group in circles(house)],
        "imports against the law": [f"{one.importer} -> {one.imported}" for one in against],
        "imports inside functions, not of heavy libraries": len(inner_imports(house)),
        "loose files in sharding, in runtime": [len(loose["sharding"]), len(loose["runtime"])],
        f"files over {LONGEST} lines": long,
        "duplicate class names": list(duplicate_classes(house)),
        "tokens of code": sum(map(tokens, texts.values())),
        "files, lines": [len(lines), sum(lines.values())],
        "words of README": len((house.root / "README.md").read_text("utf-8").split()),
        "pages of docs": len(list((house.root / "docs").rglob("*.md"))),
    }


def main() -> None:
    """Print each figure."""
    house = House.read(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    for name, value in figures(house).items():
        told = (", ".join(map(str, value)) or "none") if isinstance(value, list) else f"{value:,}"
        count = f"{len(value)}: " if isinstance(value, list) and value and isinstance(value[0], str) else ""
        print(f"{name}: {count}{told}")


if __name__ == "__main__":
    main()
