"""The C++ kernels are compiled, once, for this CPU and others, by compilers old and new; and life without them."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.cpu_layers import COMPILER

from qalora_plugin.kernels import cpu

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names instruction sets of x86-64")
@pytest.mark.parametrize("architecture", ["x86-64", "x86-64-v3", "skylake-avx512", "cooperlake", "sapphirerapids"])
def test_sources_compile_for_other_cpus(architecture):
    """Without AVX2, with it, with AVX512, with its bfloat16, with AMX: each leaves out other parts of the sources."""
    for source in Path(cpu.__file__).parent.glob("*.cpp"):
        flags = ["-std=c++20", "-O0", "-fopenmp", f"-march={architecture}", "-S", "-o", os.devnull]
        subprocess.run([COMPILER, *flags, str(source)], check=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="such compilers are old ones for x86-64")
def test_a_compiler_without_float16_makes_the_same_numbers(tmp_path):
    """GCC before 12 has no ``_Float16`` in C++. Of all numbers that there are in 16 bits."""
    source = tmp_path / "halves.cpp"
    source.write_text(
        '#include "problem.h"\nextern "C" void halves(const void* scales, float* out) {\n'
        "    Problem p{};\n    p.scales = scales; p.half_scales = 1; p.n = 65536;\n"
        "    load_scales(p, 0, 0, 65536, out);\n}\n"
    )
    folder, library = Path(cpu.__file__).parent, tmp_path / "halves.so"
    flags = ["-std=c++20", "-O3", "-U__FLT16_MANT_DIG__", "-shared", "-fPIC", f"-I{folder}"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True)
    stored, found = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16), torch.empty(65536)
    ctypes.CDLL(str(library)).halves(ctypes.c_void_p(stored.data_ptr()), ctypes.c_void_p(found.data_ptr()))
    assert torch.equal(found.isnan(), stored.isnan())
    assert torch.equal(found.nan_to_num(), stored.float().nan_to_num())
    for source in folder.glob("*.cpp"):
        subprocess.run(
            [COMPILER, *flags, "-fopenmp", "-march=cooperlake", "-S", "-o", os.devnull, str(source)], check=True
        )


WITHOUT_COMPILER = """
import logging
records = []
class Keep(logging.Handler):
    def emit(self, record): records.append(record.getMessage())
logging.getLogger("qalora_plugin").addHandler(Keep())
import torch
from support.cpu_layers import adapter_for, expected_weight, make_layer
from support.layers import assert_close, delta
from qalora_plugin.kernels import cpu
assert cpu.library() is None
for seed in range(2):  # the second layer does not try, and does not warn, again
    layer = make_layer(512, 512, 4, 32, seed=seed)
    assert cpu.why_not_fill(layer.quantized, torch.float32)
    x, (lora_a, lora_b) = torch.randn(8, 512, requires_grad=True), adapter_for(layer, 16)
    y = layer(x, delta(lora_a.requires_grad_(), lora_b.requires_grad_(), 0.5))
    y.sum().backward()
    weight = expected_weight(layer, lora_a.detach(), lora_b.detach())
    assert_close(y.detach(), x.detach().double() @ weight, 2e-6)
    assert_close(x.grad, torch.ones(8, 512).double() @ weight.t(), 2e-6)
    assert lora_a.grad.isfinite().all() and lora_b.grad.abs().sum() > 0
warnings = [message for message in records if "compile" in message]
assert len(warnings) == 1, records
print(warnings[0])
"""


def in_process_with(environment, code):
    here = Path(__file__).parent
    paths = [str(path) for path in (here, here.parent, here.parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n{code}"],
        capture_output=True, text=True, env=os.environ | environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("missing", ["compiler", "working compiler", "compiler that ends"])
def test_without_a_compiler_training_works_and_says_so_once(missing, tmp_path):
    scripts = {"working compiler": "exit 1", "compiler that ends": "sleep 60"}
    script = tmp_path / "cxx"
    script.write_text(f"#!/bin/sh\n{scripts.get(missing)}\n")
    script.chmod(0o755)
    environment = {
        "compiler": {"CXX": "nonexistent", "PATH": ""},
        "working compiler": {"CXX": str(script)},  # as the stub of a Mac without its developer tools
        "compiler that ends": {"CXX": str(script)},
    }[missing]
    patience = "from qalora_plugin.kernels.cpu import build; build._PATIENCE = 1\n"
    code = patience + WITHOUT_COMPILER if missing == "compiler that ends" else WITHOUT_COMPILER
    assert "Install g++" in in_process_with(environment | {"XDG_CACHE_HOME": str(tmp_path)}, code)


COMPILES = "from qalora_plugin.kernels import cpu; print(cpu.library()._name)"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """The kernels, compiled into a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    path = Path(in_process_with({"XDG_CACHE_HOME": str(cache)}, COMPILES).strip())
    assert path.is_relative_to(cache)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    return path


def in_a_copy(compiled, tmp_path) -> tuple[Path, dict[str, str]]:
    """The compiled file in a second cache, and the environment that uses it."""
    folder = tmp_path / "qalora" / "kernels"
    folder.parent.mkdir(mode=0o700)
    folder.mkdir(mode=0o700)
    shutil.copy(compiled, folder)
    return folder / compiled.name, {"XDG_CACHE_HOME": str(tmp_path)}


def test_compiled_once(compiled, tmp_path):
    path, environment = in_a_copy(compiled, tmp_path)
    assert in_process_with(environment | {"CXX": "c++", "PATH": ""}, COMPILES).strip() == str(path)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[::-1]])
def test_a_damaged_file_is_compiled_again(compiled, tmp_path, damage):
    """Loading half a library is SIGBUS, at every start."""
    path, environment = in_a_copy(compiled, tmp_path)
    path.write_bytes(damage(compiled.read_bytes()))
    found = Path(in_process_with(environment, COMPILES).strip())
    assert found.read_bytes().startswith(b"\x7fELF")
    assert found.stat().st_size == compiled.stat().st_size


def test_a_process_killed_while_it_compiles_holds_nobody_up(tmp_path):
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\ntouch {tmp_path}/begun\nexec sleep 60\n")
    slow.chmod(0o755)
    here = Path(__file__).parents[2]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(here), "CXX": str(slow)}
    first = subprocess.Popen([sys.executable, "-c", COMPILES], env=environment)
    while not (tmp_path / "begun").exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    slow.write_text('#!/bin/sh\nexec c++ "$@"\n')
    start = time.monotonic()
    assert in_process_with({"XDG_CACHE_HOME": str(tmp_path), "CXX": str(slow)}, COMPILES).strip().endswith(".so")
    assert time.monotonic() - start < 60


def test_waiting_for_another_process_ends(tmp_path):
    code = """
import fcntl, os, sys
from qalora_plugin.kernels import cpu
from qalora_plugin.kernels.cpu import build
from qalora_plugin.core.private_cache import private_folder
build._PATIENCE = 0.5
lock = private_folder("kernels") / f"cpu-{build._kind()}.lock"
handle = os.open(lock, os.O_RDWR | os.O_CREAT)
fcntl.flock(handle, fcntl.LOCK_EX)
print(cpu.library())
"""
    assert in_process_with({"XDG_CACHE_HOME": str(tmp_path)}, code).strip() == "None"


@pytest.mark.parametrize("fault", ["read-only", "without locks", "for another system"])
def test_a_cache_that_cannot_be_used_is_gone_without(compiled, tmp_path, fault):
    """Compiled for this process alone."""
    path, environment = in_a_copy(compiled, tmp_path)
    code = COMPILES
    if fault == "for another system":  # of a home that machines share: its name says that it is whole
        content = b"\x7fELF, but not for this one"
        path.unlink()
        path = path.with_name(f"{path.name.rpartition('-')[0]}-{hashlib.sha256(content).hexdigest()[:16]}.so")
        path.write_bytes(content)
    else:
        path.unlink()
        number = {"read-only": "EROFS", "without locks": "ENOLCK"}[fault]
        code = f"""
import errno, os
from qalora_plugin.kernels.cpu import build
def fail(*_): raise OSError(errno.{number}, os.strerror(errno.{number}))
build.fcntl.flock = fail
{COMPILES}"""
    found = in_process_with(environment, code).strip()
    assert found.endswith(".so")
    assert not found.startswith(str(tmp_path))


def test_a_library_that_somebody_else_could_have_planted_is_not_loaded(compiled, tmp_path):
    """A cache folder that is open to others, or a link: compiled for this process alone, elsewhere."""
    path, environment = in_a_copy(compiled, tmp_path)
    path.parent.chmod(0o777)
    assert not in_process_with(environment, COMPILES).strip().startswith(str(tmp_path))
    (tmp_path / "file").touch()
    found = in_process_with({"XDG_CACHE_HOME": str(tmp_path / "file" / "below")}, COMPILES).strip()
    assert found.endswith(".so")
