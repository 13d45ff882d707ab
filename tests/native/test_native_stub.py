"""The stub file says of the native module what is so."""

import ast
from pathlib import Path

import gmemd.native
from gmemd.native import ffi, lib

STUB = ast.parse(Path(gmemd.native.__file__).with_name("_native.pyi").read_text())
LIB = next(node for node in STUB.body if isinstance(node, ast.ClassDef) and node.name == "_Lib")
NUMBERS = {n.target.id for n in LIB.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
FUNCTIONS = {node.name: node for node in LIB.body if isinstance(node, ast.FunctionDef)}


def test_every_name_and_no_other() -> None:
    numbers = {name for name in dir(lib) if isinstance(getattr(lib, name), int)}
    assert numbers == NUMBERS
    assert set(dir(lib)) - numbers == FUNCTIONS.keys()


def test_as_many_parameters() -> None:
    for name, node in FUNCTIONS.items():
        assert len(node.args.posonlyargs) + len(node.args.args) - 1 == len(ffi.typeof(getattr(lib, name)).args), name


def test_what_comes_back() -> None:
    kinds = {"void": "None", "primitive": "int", "enum": "int", "pointer": "CData", "struct": "CData"}
    for name, node in FUNCTIONS.items():
        assert node.returns is not None
        result = ffi.typeof(getattr(lib, name)).result
        wanted = "bool" if result.cname == "_Bool" else kinds[result.kind]
        assert ast.unparse(node.returns) == wanted, name
