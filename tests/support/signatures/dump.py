"""Write the signature tables from wheels: what TensorRT and torch-tensorrt can be called with.

    python tests/support/signatures/dump.py tensorrt_cu13_bindings-*.whl torch_tensorrt-*.whl

TensorRT's bindings are imported against empty stub libraries, so that neither TensorRT nor a GPU is needed; their
signatures are the first lines of pybind11's docstrings.  torch-tensorrt is read as source and never imported.  The
wheels must be of this Python's version; gcc is needed.  This script must not know what the backend calls.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CLASSES = (
    "Runtime",
    "ICudaEngine",
    "IExecutionContext",
    "EngineInspector",
    "IHostMemory",
    "Builder",
    "IBuilderConfig",
    "INetworkDefinition",
    "IOptimizationProfile",
    "ITimingCache",
    "OnnxParser",
    "ParserError",
)
ENUMS = (
    "BuilderFlag",
    "DataType",
    "EngineStat",
    "LayerInformationFormat",
    "NetworkDefinitionCreationFlag",
    "TensorIOMode",
)
FUNCTIONS = ("dynamo/_compiler.py:convert_exported_program_to_serialized_trt_engine", "_Input.py:Input")
CONSTANTS = ("logging.py:TRT_LOGGER",)
LIBRARIES = ("libnvinfer.so", "libnvinfer_plugin.so", "libnvonnxparser.so")
# Everything the bindings need from the libraries; none of it is called while signatures are read.
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def signatures(name: str, text: str | None) -> list[str]:
    """The signatures that pybind11 writes at the head of a docstring; several if the function is overloaded."""
    lines = [line.strip() for line in (text or "").splitlines()]
    if len(lines) > 1 and lines[1].startswith("Overloaded"):
        lines = [line.split(". ", 1)[1] for line in lines if re.match(rf"\d+\. {re.escape(name)}\(", line)]
    else:
        lines = lines[:1]
    # Unregistered defaults are printed with their address, which differs from run to run.
    return [re.sub(r" object at 0x[0-9a-f]+", "", line) for line in lines if line.startswith(f"{name}(")]


def bindings_table() -> dict[str, Any]:
    """The table of the bindings that this interpreter can import."""
    import tensorrt_bindings as tensorrt

    table: dict[str, Any] = {"version": tensorrt.__version__, "classes": {}, "enums": {}}
    for class_name in CLASSES:
        members: dict[str, Any] = {}
        for name in dir(getattr(tensorrt, class_name)):
            member = getattr(getattr(tensorrt, class_name), name)
            if isinstance(member, property):
                members[name] = "property" if member.fset is None else "writable property"
            elif (found := signatures(name, member.__doc__)) and (name == "__init__" or name[0] != "_"):
                members[name] = found
        table["classes"][class_name] = members
    for enum in ENUMS:
        if hasattr(tensorrt, enum):
            table["enums"][enum] = sorted(getattr(tensorrt, enum).__members__)
    return table


def unpack_bindings(wheel: Path, folder: str) -> None:
    """Unpack a wheel of bindings, with stubs beside it of the libraries that they are linked to."""
    major = wheel.name.split("-")[1].split(".")[0]
    zipfile.ZipFile(wheel).extractall(folder)
    source = "".join(f"long {symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS)
    for library in LIBRARIES:
        stub = f"{library}.{major}"
        build = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{stub}", "-x", "c", "-", "-o", f"{folder}/{stub}"]
        subprocess.run(build, check=True, input=source, text=True)


def dump_bindings(wheel: Path) -> dict[str, Any]:
    """The table of a wheel of bindings, made in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        unpack_bindings(wheel, folder)
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": folder}
        child = [sys.executable, str(Path(__file__).resolve()), "--imported"]
        output = subprocess.run(child, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    table: dict[str, Any] = json.loads(output)
    return table


def parameters(function: ast.FunctionDef) -> dict[str, Any]:
    """Names of a function's parameters, by how they may be passed."""
    arguments = function.args
    return {
        "positional": [argument.arg for argument in arguments.posonlyargs + arguments.args],
        "keyword_only": [argument.arg for argument in arguments.kwonlyargs],
        "variadic": [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None],
        "returns": ast.unparse(function.returns) if function.returns else None,
    }


def keys_read(function: ast.FunctionDef, variable: str) -> list[str]:
    """The names that a function looks up in its ``**variable``, whose signature does not tell them."""
    found = set()
    for node in ast.walk(function):
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key))) if name == variable:
                found.add(key)
            case ast.Compare(left=ast.Constant(value=str(key)), comparators=[ast.Name(id=name)]) if name == variable:
                found.add(key)
    return sorted(found)


def dump_torch_tensorrt(wheel: Path) -> dict[str, Any]:
    """The table of a wheel of torch-tensorrt, read from its source."""
    table: dict[str, Any] = {"version": wheel.name.split("-")[1], "functions": {}, "constants": []}
    with zipfile.ZipFile(wheel) as archive:
        for place in FUNCTIONS:
            path, name = place.split(":")
            tree = ast.parse(archive.read(f"torch_tensorrt/{path}"))
            found = next(node for node in tree.body if getattr(node, "name", "") == name)
            if isinstance(found, ast.ClassDef):
                found = next(node for node in found.body if getattr(node, "name", "") == "__init__")
            assert isinstance(found, ast.FunctionDef)
            entry = parameters(found)
            entry["keys_read"] = keys_read(found, found.args.kwarg.arg) if found.args.kwarg else []
            table["functions"][name] = entry
        for place in CONSTANTS:
            path, name = place.split(":")
            assigned = [
                node for node in ast.parse(archive.read(f"torch_tensorrt/{path}")).body if isinstance(node, ast.Assign)
            ]
            if name in {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)}:
                table["constants"].append(place)
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
        table["requires"] = sorted(
            {line.split(": ")[1] for line in lines if re.match(r"Requires-Dist: (torch|tens)", line)}
        )
    return table


def main(wheels: list[str]) -> None:
    """Write one table beside this script for every wheel."""
    for wheel in map(Path, wheels):
        package, version = wheel.name.split("-")[:2]
        if package == "torch_tensorrt":
            name, table = f"torch_tensorrt-{version}.json", dump_torch_tensorrt(wheel)
        else:
            name, table = f"tensorrt-{version}.json", dump_bindings(wheel)
        (HERE / name).write_text(json.dumps(table, indent=1) + "\n")
        print(f"{name}: {(HERE / name).stat().st_size} bytes")


if __name__ == "__main__":
    if sys.argv[1:] == ["--imported"]:
        print(json.dumps(bindings_table()))
    else:
        main(sys.argv[1:])
