"""The backend keeps its contract: the names that it owes, with their arguments, and no others."""

import ast
import inspect
import pathlib
import re

import pytest

import keras_dp
from keras_dp import backend
from keras_dp.backend import contract, tensorflow

pytestmark = pytest.mark.fast

PACKAGE = pathlib.Path(keras_dp.__file__).parent


def arguments_of(found):
    """The arguments of a function or class, without types and defaults."""
    parts = []
    for parameter in inspect.signature(found).parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        star = "*" if parameter.kind == parameter.VAR_POSITIONAL else ""
        parts.append(star + parameter.name)
    return ", ".join(parts)


def names_used():
    """Every name of the backend that the rest of the package uses, by file."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        if PACKAGE / "backend" in file.parents:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "backend":
                    found.setdefault(node.attr, file.name)
            elif isinstance(node, ast.ImportFrom) and node.module == "backend":
                found |= {alias.name: file.name for alias in node.names}
    return found


def test_the_door_has_what_the_contract_lists_and_nothing_else():
    assert contract.NAMES == sorted(set(contract.NAMES)) == tensorflow.__all__ == backend.__all__
    theirs = {name for name, value in vars(backend).items() if not inspect.ismodule(value)}
    assert {n for n in theirs if n[0] != "_"} == {*contract.NAMES, "NAMES", "TYPE_CHECKING"}


@pytest.mark.parametrize("signature", contract.CONTRACT)
def test_the_backend_has_each_name_as_the_contract_says(signature):
    name, _, arguments = signature.partition("(")
    found = getattr(backend, name)
    assert inspect.getdoc(found)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        assert arguments == arguments_of(found) + ")"
    for attribute in re.findall(r"`\.(\w+)(?:\(\))?`", contract.CONTRACT[signature]):
        assert hasattr(found, attribute) or f"self.{attribute}" in inspect.getsource(found)


def test_the_package_uses_all_names_of_the_contract_and_no_others():
    assert names_used().keys() == set(contract.NAMES)
