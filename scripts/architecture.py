"""Print which module imports which, and the longest files and functions.

python scripts/architecture.py            the table of docs/explanation/architecture.md
python scripts/architecture.py --longest  the longest files and functions, and most branches
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mpisyncbn"
BRANCHES = ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.BoolOp, ast.comprehension, ast.Assert


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--longest", action="store_true")
    print(longest() if parser.parse_args().longest else table())


def table() -> str:
    """A Markdown table of which top-level module or folder of the package imports which others."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(place(path), set()).update(parts[0] for parts in imports(path))
    rows = ["| module or folder | imports |", "| --- | --- |"]
    for name in ordered(found):
        others = [f"`{each}`" for each in ordered(found) if each in found[name] - {name}]
        rows.append(f"| `{name}` | {', '.join(others) or '-'} |")
    return "\n".join(rows)


def place(path: Path) -> str:
    """The name of the top-level module or folder of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, ...]]:
    """The modules of the package that a file imports, each as the parts of its path.

    Only relative imports count, except those under ``if TYPE_CHECKING:``.
    """
    module, found = ast.parse(path.read_text()), []
    for node in ast.walk(module):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.relative_to(PACKAGE).parts[: -node.level]
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                inside = PACKAGE.joinpath(*base, alias.name)
                is_module = inside.is_dir() or inside.with_suffix(".py").exists()
                found.append((*base, alias.name) if is_module else base)
    return found


def ordered(found: dict[str, set[str]]) -> list[str]:
    """Sort the names so that each comes before the names that it imports."""
    done: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for other in sorted(found.get(name, ())):
                if other != name:
                    visit(other)
            done.append(name)

    for name in sorted(found, reverse=True):
        visit(name)
    return done[::-1]


def sizes() -> tuple[dict[str, int], dict[str, int]]:
    """Count the lines of each file, C++ too, and of each Python function minus its docstring."""
    files, functions = {}, {}
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".py", ".cpp", ".h"):
            files[str(path.relative_to(PACKAGE))] = len(path.read_text().splitlines())
    for name, node in functions_of_the_package():
        functions[name] = (node.end_lineno or 0) - node.lineno + 1 - docstring_lines(node)
    return files, functions


def functions_of_the_package() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(PACKAGE)}: {node.name}", node


def longest() -> str:
    """The ten longest files, the ten longest functions, and the ten functions with most branches.

    The last line counts the word ``Any`` in the package, without ``import Any``.
    """
    files, functions = sizes()
    branches = {
        name: sum(isinstance(each, BRANCHES) for each in ast.walk(node))
        for name, node in functions_of_the_package()
    }
    shown = []
    for unit, counts in (("lines", files), ("lines", functions), ("branches", branches)):
        largest = sorted(counts, key=lambda name: counts[name], reverse=True)[:10]
        shown += [f"{counts[name]:4} {unit}  {name}" for name in largest]
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    count = len(re.findall(r"(?<!import )\bAny\b", text))
    return "\n".join([*shown, f"{count:4} times Any"])


def docstring_lines(node: ast.FunctionDef) -> int:
    first = node.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return (first.end_lineno or 0) - first.lineno + 1 if is_text else 0


if __name__ == "__main__":
    main()
