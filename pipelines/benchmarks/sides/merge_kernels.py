"""The merge's kernels compiled for a card that need not be here: PTX, cubin, registers, spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["CompiledKernel", "compile_kernels"]


@dataclass(frozen=True)
class CompiledKernel:
    """What ptxas made of a kernel.

    Attributes:
        name: Of the kernel.
        registers: Of a thread.
        spill_bytes: Stored to and loaded from local memory because registers ran out.
        widest_load: Bytes of the widest load from global memory.
        ptx: Its text.
        cubin: The machine's code.
    """

    name: str
    registers: int
    spill_bytes: int
    widest_load: int
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)


def compile_kernels(capability: int, *, hidden: int, dtype: str = "bf16") -> list[CompiledKernel]:
    """Compile all kernels as a run with `hidden` columns would, for `sm_<capability>`.

    Args:
        capability: 80 for A100, 90 for H100 and H200, 100 for B200.
        hidden: D.
        dtype: Triton's name of the features' type.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled: list[CompiledKernel] = []
    for kernel, types, constants in _signatures(hidden, dtype):
        # pointers from torch's allocator are aligned to more than 16 bytes; a launch finds out
        names: list[str] = kernel.arg_names
        aligned = {
            (k,): [["tt.divisibility", 16]]
            for k, name in enumerate(names)
            if types[name].startswith("*")
        }
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        target = GPUTarget("cuda", capability, 32)
        built = triton.compile(source, target=target, options={"num_warps": 4})
        compiled.append(_described(kernel.__name__, built, capability))
    return compiled


def _signatures(hidden: int, dtype: str) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Kernel, the types of its arguments and its constants."""
    import triton.language as tl

    from lapilli.model.kernels import merge as kernels

    columns, rows = kernels.tile(hidden, 2 if dtype in ("bf16", "fp16") else 4)
    copy = {"D": hidden, "BLOCK_D": columns, "ROWS": rows}
    block = min(columns, 1024)
    summed = {"CHUNK": kernels.CHUNK, "SUM_ROWS": kernels.SUM_ROWS, "SUM": tl.float32}
    pointers = {
        "ids": "*i64", "index": "*i32", "places": "*i32", "keys": "*i32", "order": "*i64",
        "first": "*i32", "last": "*i32", "partial": "*fp32",
        "rows": "i32", "positions": "i32", "vocabulary": "i32",
    }  # fmt: skip
    for kernel, constants in (
        (kernels.merge_forward_kernel, copy),
        (kernels.features_backward_kernel, copy),
        (kernels.segments_kernel, {"D": hidden, "BLOCK_D": block, **summed}),
        (kernels.embedding_backward_kernel, {"D": hidden, "BLOCK_D": block, **summed}),
    ):
        names: list[str] = kernel.arg_names
        types = {n: "constexpr" if n in constants else pointers.get(n, f"*{dtype}") for n in names}
        yield kernel, types, constants


def _described(name: str, built: Any, capability: int) -> CompiledKernel:
    ptx: str = built.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        (arch,) = re.findall(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
        said = subprocess.run(
            [_ptxas(capability), "-v", f"--gpu-name={arch}", str(source), "-o", f"{folder}/out"],
            check=True,
            capture_output=True,
            text=True,
        )
    text = said.stdout + said.stderr
    loads = re.findall(r"ld\.global\S*?\.v(\d)\.b(\d+)", ptx)
    return CompiledKernel(
        name=name,
        registers=int(re.findall(r"Used (\d+) registers", text)[0]),
        spill_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", text))),
        widest_load=max((int(n) * int(bits) // 8 for n, bits in loads), default=0),
        ptx=ptx,
        cubin=built.asm["cubin"],
    )


def _ptxas(capability: int) -> str:
    """The assembler that Triton brings; Blackwell's cards have one of their own."""
    import triton

    name = "ptxas-blackwell" if capability >= 100 else "ptxas"
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
