"""Writes the generated tables of architecture.md: imports, and the tests of each rule.

    python docs/tables.py

A test compares the tables with the files.
"""

from __future__ import annotations

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "keras_dp"
RULES = range(1, 20)


def modules() -> dict[str, pathlib.Path]:
    """Every module of the package by its name, without `keras_dp.`."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(name: str, known: dict[str, pathlib.Path]) -> set[str]:
    """The modules of the package that one imports, for types too."""
    file, found = known[name], set()
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        target = [*base, *(node.module.split(".") if node.module else [])]
        for alias in node.names:
            whole = ".".join([*target, alias.name])
            found.add(whole if whole in known else ".".join(target))
    return (found & known.keys()) - {name, ""}


def in_order(known: dict[str, pathlib.Path]) -> list[str]:
    """The modules, each after all that it imports.

    Raises:
        ValueError: If there is a circle.
    """
    done: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise ValueError(" -> ".join([*above[above.index(name) :], name]))
        if name not in done:
            for other in sorted(imports_of(name, known)):
                visit(other, (*above, name))
            done.append(name)

    for name in known:
        visit(name, ())
    return done


def table_of_imports() -> str:
    """Each file, below all that it imports."""
    known = modules()
    rows = ["| file | imports of ours |", "|---|---|"]
    for name in in_order(known):
        if name:
            listed = ", ".join(f"`{other}`" for other in sorted(imports_of(name, known)))
            rows.append(f"| `{name}` | {listed or '–'} |")
    return "\n".join(rows)


def tests_of_rules() -> dict[int, list[str]]:
    """The test files that name each rule in a test, class or module."""
    found: dict[int, list[str]] = {rule: [] for rule in RULES}
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        for number in sorted(set(re.findall(r"rule_(\d\d)\b|rule_(\d\d)_", file.read_text()))):
            rule = int(number[0] or number[1])
            if rule in found:
                found[rule].append(file.stem)
    return found


def table_of_rules() -> str:
    """Which test files hold which rule."""
    rows = ["| rule | tests |", "|---|---|"]
    for rule, files in tests_of_rules().items():
        rows.append(f"| {rule} | {', '.join(f'`{name}`' for name in files)} |")
    return "\n".join(rows)


TABLES = {"imports": table_of_imports, "rules": table_of_rules}


def with_tables(text: str) -> str:
    """The page with each table between its marks as it is now."""
    for name, table in TABLES.items():
        start, end = f"<!-- table of {name}: docs/tables.py -->", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        after = rest.split(end)[1]
        text = f"{before}{start}\n\n{table()}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
