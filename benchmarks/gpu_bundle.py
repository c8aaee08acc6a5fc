"""What a bare GPU machine lacks for ``gpu_check.py``, taken out of wheels into one small folder.

    python benchmarks/gpu_bundle.py OUT                        for compute capability 9.0 (H100, H200)
    python benchmarks/gpu_bundle.py OUT --capability 8.9 --bitsandbytes 0.50.2

OUT then holds ``vllm_ops.so.xz`` (vLLM's Marlin and Machete, as a library of torch ops that needs no vLLM; built
against torch's stable ABI, so torch 2.11 or newer) and ``bitsandbytes/``, its Python and one CUDA version's library.
Of vLLM's ops only the machine code of the one capability is kept: the other nine tenths are blanked, and compress to
nothing. The check unpacks what it finds: ``python benchmarks/gpu_check.py --bundle OUT``.

vLLM's own Python stays out: its layers import some sixty packages before the first linear, and the release for today's
torch does not promise to run with an older one. So the check calls the ops as vLLM's kernels call them.
"""

import argparse
import lzma
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OPS = "vllm/_C_stable_libtorch.abi3.so"
LIMIT = 60 << 20  # bytes of a folder
_PTX, _CUBIN = 1, 2  # kinds of an entry
_CONTAINER, _ENTRY = struct.Struct("<IHHQ"), struct.Struct("<HHIQIIHHI")
_MAGIC = 0xBA55ED50  # of a fat binary, as the CUDA tools write them into a library's section .nv_fatbin


def fetch(requirement: str, folder: Path) -> zipfile.ZipFile:
    """Download a wheel for Linux on x86-64, without what it depends on."""
    platforms = [f"manylinux{tag}_x86_64" for tag in ("1", "2014", "_2_24", "_2_28", "_2_31", "_2_34", "_2_35")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
    command += ["--python-version", "3.12", *(f"--platform={name}" for name in platforms), requirement]
    print(f"fetching {requirement} …", flush=True)
    subprocess.run(command, check=True)
    name = requirement.split("==")[0].replace("-", "_")
    return zipfile.ZipFile(next(folder.glob(f"{name}-*.whl")))


def only_capability(library: bytes, capability: int) -> bytes:
    """``library`` with the payload of all GPU code blanked but that of one capability (90: H100).

    A container without machine code for it keeps its newest PTX that the driver can compile. Headers stay as they are,
    so the driver finds, and passes over, what is blank.
    """
    data, start = bytearray(library), 0
    magic = struct.pack("<I", _MAGIC)
    while (start := data.find(magic, start)) >= 0:
        _, _, header, size = _CONTAINER.unpack_from(data, start)
        entries, at, end = [], start + header, start + header + size
        while at < end:
            kind, _, entry_header, entry_size, _, _, _, _, arch = _ENTRY.unpack_from(data, at)
            if kind not in (_PTX, _CUBIN) or entry_header < _ENTRY.size:
                raise SystemExit(f"byte {at}: no fat binary entry as this tool knows them. Bundle the whole library.")
            entries.append((kind, arch, at + entry_header, entry_size))
            at += entry_header + entry_size
        kept = {place for kind, arch, place, _ in entries if kind == _CUBIN and arch == capability}
        if not kept:
            ptx = [(arch, place) for kind, arch, place, _ in entries if kind == _PTX and arch <= capability]
            kept = {max(ptx)[1]} if ptx else set()
        for _, _, place, length in entries:
            if place not in kept:
                data[place : place + length] = bytes(length)
        start = end
    return bytes(data)


def bundle(out: Path, capability: int, vllm: str, bitsandbytes: str, cuda: str) -> None:
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = fetch(f"vllm=={vllm}", Path(scratch))
        ops = only_capability(wheel.read(OPS), capability)
        (out / "vllm_ops.so.xz").write_bytes(lzma.compress(ops, preset=6))
        wheel = fetch(f"bitsandbytes=={bitsandbytes}", Path(scratch))
        kept = f"libbitsandbytes_cuda{cuda}.so"
        if f"bitsandbytes/{kept}" not in wheel.namelist():
            raise SystemExit(f"bitsandbytes {bitsandbytes} has no {kept}. Choose another --cuda.")
        for name in wheel.namelist():
            if name.endswith((".py", "METADATA", "RECORD", kept)):
                wheel.extract(name, out)
    (out / "versions.txt").write_text(f"vllm {vllm}\nbitsandbytes {bitsandbytes}\ncapability {capability}\n")
    size = sum(path.stat().st_size for path in out.rglob("*"))
    print(f"{out}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT >> 20} MiB: it may not travel in one piece.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--capability", default="9.0", help="of the GPU that will run it")
    parser.add_argument("--vllm", default="0.33.0")
    parser.add_argument("--bitsandbytes", default="0.50.2")
    parser.add_argument("--cuda", default="130", help="whose bitsandbytes library to take: 130 is CUDA 13.0")
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} exists. Choose a new folder.")
    bundle(args.out, int(args.capability.replace(".", "")), args.vllm, args.bitsandbytes, args.cuda)


if __name__ == "__main__":
    main()
