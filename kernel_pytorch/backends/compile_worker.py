"""The process that runs Triton's compilers: LLVM ends its process when inline assembly does not fit the target.

One JSON line in, one out; run as a module by `compile_process`. Needs Triton, not torch.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError


def source_of(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], aligned: Sequence[str]) -> ASTSource:
    """A kernel with its specialization, as Triton compiles it; its `hash()` covers the functions that the kernel calls."""
    # In the order of the arguments: that is how Triton counts them.
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    kind = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        kind = GluonASTSource
    return kind(kernel, signature=signature, constexprs=dict(constants), attrs=attrs)


def find_kernel(module: str, file: str, function: str) -> Any:
    """The function by that name of the module, or of the file where no module is importable under that name from that file."""
    try:
        found = None if module == "__main__" else importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is not None and found.origin is not None and Path(found.origin).resolve() == Path(file).resolve():
        return getattr(importlib.import_module(module), function)
    spec = importlib.util.spec_from_file_location(f"_kernels_of_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return getattr(loaded, function)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the compiler made of one request, or {"error": its message}. Other failures end this process, on purpose."""
    kernel = find_kernel(request["module"], request["file"], request["function"])
    source = source_of(kernel, request["types"], request["constants"], request["aligned"])
    try:
        built = triton.compile(source, target=GPUTarget(*request["target"]), options=request["options"])
    except TritonError as error:
        return {"error": str(error)}
    return {
        "source": source.hash(),
        "entry": built.metadata.name,
        "num_warps": built.metadata.num_warps,
        "shared_bytes": built.metadata.shared,
        "binary": base64.b64encode(built.asm[request["binary"]]).decode(),
        "assembly": built.asm[request["assembly"]],
    }


def serve(requests: TextIO, answers: TextIO) -> None:
    for line in requests:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Compilers print to standard output, where the answers go: from here on that is standard error.
    with os.fdopen(os.dup(1), "w") as pipe:
        os.dup2(2, 1)
        serve(sys.stdin, pipe)
