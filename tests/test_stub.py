"""_core.pyi says what the compiled module has: the same names, members and parameters."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import bicache
from bicache import _core


def _stub() -> ast.Module:
    return ast.parse((Path(bicache.__file__).parent / "_core.pyi").read_text())


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def _stub_names() -> dict[str, set[str]]:
    """Public names of the stub, with the members of its classes."""
    names: dict[str, set[str]] = {}
    for node in _stub().body:
        if isinstance(node, ast.ClassDef):
            members = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            names[node.name] = {member for member in members if _is_public(member)}
        elif isinstance(node, ast.FunctionDef):
            names[node.name] = set()
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = set()
    return names


def _module_names() -> dict[str, set[str]]:
    names: dict[str, set[str]] = {}
    for name, value in vars(_core).items():
        if inspect.isclass(value):
            names[name] = {member for member in vars(value) if _is_public(member)}
        elif _is_public(name) or name == "__version__":
            names[name] = set()
    return names


def test_names_and_members_are_the_same() -> None:
    stub, module = _stub_names(), _module_names()
    assert sorted(stub) == sorted(module)
    for name, members in module.items():
        assert sorted(stub[name]) == sorted(members), name


def _functions() -> list[tuple[str, ast.FunctionDef, object]]:
    found: list[tuple[str, ast.FunctionDef, object]] = []
    for node in _stub().body:
        if isinstance(node, ast.FunctionDef):
            found.append((node.name, node, getattr(_core, node.name)))
        elif isinstance(node, ast.ClassDef):
            kind = getattr(_core, node.name)
            found += [
                (f"{node.name}.{n.name}", n, getattr(kind, n.name))
                for n in node.body
                if isinstance(n, ast.FunctionDef) and not n.decorator_list
            ]
    return found


def test_parameters_are_the_same() -> None:
    checked = 0
    for name, node, function in _functions():
        head = (function.__doc__ or "").split(" ->")[0]
        bound = re.findall(r"(?:\(|, )(\w+): ", head)
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        assert [a.arg for a in arguments if a.arg != "self"] == [
            parameter for parameter in bound if parameter != "self"
        ], (name, head)
        keyword_only = head.partition(", *,")[2]
        assert [a.arg for a in node.args.kwonlyargs] == re.findall(r" (\w+): ", keyword_only), name
        checked += 1
    assert checked >= 15
