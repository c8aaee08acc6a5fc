"""Triton kernels compiled ahead of time for NVIDIA GPUs, which needs none, and what their machine code shows."""

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
MULTIPLE_OF_16 = [["tt.divisibility", 16]]  # what Triton itself finds out about aligned pointers and such sizes


def run_uninterpreted(program: Path) -> None:
    """Run a program that compiles kernels, without TRITON_INTERPRET, which would leave nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parents[1]), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    subprocess.run([sys.executable, program], check=True, env=environment)


def instructions(kernel, arguments: dict, constants: dict, capability: int, warps: int = 4) -> list[str]:
    """Instruction names, like ``LDG.E.128``, of ``kernel`` on ``capability`` (90: H100).

    Args:
        arguments: name → Triton type; all are taken to be multiples of 16. constants: name → value.
    """
    with NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(_compiled(kernel, arguments, constants, capability, warps).asm["cubin"])
        listing = subprocess.run([NVDISASM, "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE)


def shared_kilobytes(kernel, arguments: dict, constants: dict, capability: int, warps: int = 4) -> float:
    """KiB of shared memory that a program of ``kernel`` takes."""
    return _compiled(kernel, arguments, constants, capability, warps).metadata.shared / 1024


def _compiled(kernel, arguments: dict, constants: dict, capability: int, warps: int):
    source = ASTSource(
        fn=kernel,
        signature=arguments | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(place,): MULTIPLE_OF_16 for place in range(len(arguments))},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def spills(names: list[str]) -> bool:
    """Whether a tile did not fit into the registers. (Two or three such instructions are some scalar's.)"""
    return sum(name.startswith(("LDL", "STL")) for name in names) > 4


def widths(names: list[str], kind: str) -> set[int]:
    """Bits a thread moves at once in instructions ``kind``: ``"LDG"`` loads from memory, ``"STG"`` stores to it."""
    found = set()
    for name in names:
        if name.split(".")[0] == kind:
            width = re.search(r"\.[US]?(8|16|64|128)\b", name)
            found.add(int(width[1]) if width else 32)
    return found


def bits_moved(names: list[str], kind: str) -> int:
    """Bits that a thread moves in all, where no such instruction is inside a loop."""
    moved = 0
    for name in names:
        if name.split(".")[0] == kind:
            width = re.search(r"\.[US]?(8|16|64|128)\b", name)
            moved += int(width[1]) if width else 32
    return moved
