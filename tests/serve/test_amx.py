"""Asking Linux for AMX, before a process uses it. No machine of the tests has it: what Linux is asked is looked at."""

import ctypes
import errno
import platform

import pytest
import torch

from vllm_ext import amx
from vllm_ext.int4_cpu import Int4PackKernel

FLAGS = "processor\t: 0\nflags\t\t: fpu avx512f {}\nprocessor\t: 1\n"


class Libc:
    def __init__(self, answer: int):
        self.answer, self.calls = answer, []

    def syscall(self, *arguments: int) -> int:
        self.calls.append(arguments)
        ctypes.set_errno(errno.ENOSPC)
        return self.answer


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with these flags, whose Linux answers thus."""

    def make(flags: str, answer: int = 0) -> Libc:
        libc = Libc(answer)
        (tmp_path / "cpuinfo").write_text(FLAGS.format(flags))
        monkeypatch.setattr(amx, "_CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: libc)
        return libc

    amx.request.cache_clear()
    yield make
    amx.request.cache_clear()


def test_asked_once(machine):
    libc = machine("amx_bf16 amx_tile amx_int8")
    assert amx.request()
    assert amx.request()
    assert libc.calls == [(158, 0x1023, 18)]


def test_not_asked_without_amx(machine):
    libc = machine("amx_tiles_of_another_kind")
    assert not amx.request()
    assert libc.calls == []


def test_refused(machine, monkeypatch):
    machine("amx_tile", answer=-1)
    heard = []
    monkeypatch.setattr(amx.logger, "warning", lambda message, *arguments: heard.append(message % arguments))
    assert not amx.request()
    assert heard == ["qalora: Linux does not grant AMX (No space left on device)"]


def test_asked_before_the_int4_kernel_is_used(monkeypatch):
    asked = []
    monkeypatch.setattr(amx, "request", lambda: asked.append(True))
    layer = torch.nn.Module()
    layer.qweight = torch.nn.Parameter(torch.zeros(8, 64, dtype=torch.int32), requires_grad=False)
    layer.scales = torch.nn.Parameter(torch.ones(2, 64), requires_grad=False)
    zeros = torch.full((2, 64), 8, dtype=torch.uint8)
    Int4PackKernel((64, 64), 32).hand_over(layer, zeros, 4, torch.zeros(2, 64))
    assert asked
