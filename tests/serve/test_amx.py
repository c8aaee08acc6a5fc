"""CPUs with AMX: Linux is asked for it before a process uses it, and the faster path is taken. A machine of the tests
may not have it: what is asked is looked at, and the timing runs on what there is."""

import pytest
import torch
from support.hardware import needs_kernel
from support.vllm_layers import K
from vllm import envs

from vllm_ext.config import QALoraConfig
from vllm_ext.kernels import amx, select
from vllm_ext.kernels.cpu_int4 import Int4PackKernel
from vllm_ext.kernels.select import FUSED, SEPARATE, LayerKind, choose_path


@pytest.fixture
def machine(monkeypatch):
    """A machine with or without AMX, whose Linux answers thus; what it was asked."""
    asked = []

    def make(has: bool, grants: bool = True) -> list:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has)
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(True) or grants)
        return asked

    amx.request.cache_clear()
    yield make
    amx.request.cache_clear()


def test_asked_once(machine):
    asked = machine(True)
    assert amx.request()
    assert amx.request()
    assert asked == [True]


def test_not_asked_without_amx(machine):
    asked = machine(False)
    assert not amx.request()
    assert not asked


def test_refused(machine, monkeypatch):
    machine(True, grants=False)
    heard = []
    monkeypatch.setattr(amx.logger, "warning", heard.append)
    assert not amx.request()
    assert heard == ["qalora: Linux does not grant AMX to this process"]


def test_asked_before_the_int4_kernel_is_used(monkeypatch):
    asked = []
    monkeypatch.setattr(amx, "request", lambda: asked.append(True))
    layer = torch.nn.Module()
    layer.qweight = torch.nn.Parameter(torch.zeros(8, 64, dtype=torch.int32), requires_grad=False)
    layer.scales = torch.nn.Parameter(torch.ones(2, 64), requires_grad=False)
    zeros = torch.full((2, 64), 8, dtype=torch.uint8)
    Int4PackKernel((64, 64), 32).hand_over(layer, zeros, 4, torch.zeros(2, 64))
    assert asked


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qalora" / "paths"


@needs_kernel
def test_timed_once_for_a_machine(cache, monkeypatch):
    path = amx.faster_path(32, "code")
    assert path in (FUSED, SEPARATE)
    monkeypatch.setattr(amx, "_linears", None)
    assert amx.faster_path(32, "code") == path
    with pytest.raises(TypeError):  # another version: timed again
        amx.faster_path(32, "other code")
    (entry,) = cache.iterdir()
    entry.write_text("damaged")
    with pytest.raises(TypeError):
        amx.faster_path(32, "code")


@needs_kernel
def test_both_linears_that_are_timed_compute_the_same():
    fused, separate = amx._linears(64)
    x = torch.randn(3, amx._SIZE).bfloat16()
    y, other = fused(x).float(), separate(x).float()
    assert (y - other).norm() <= 0.01 * y.norm()


@needs_kernel
@pytest.mark.parametrize(("seconds", "expected"), [((1.0, 1.0, 1.3), FUSED), ((1.0, 1.0, 0.7), SEPARATE)])
def test_the_faster_one_is_taken(cache, machine, monkeypatch, seconds, expected):
    machine(True)
    times = iter([[1.0, 1.0, 1.0], list(seconds)])
    monkeypatch.setattr(amx, "_seconds", lambda linear: next(times))
    config = QALoraConfig.from_config({"quant_method": "qalora", "bits": 4, "group_size": 32, "format_version": 1})
    assert config.timed_path == expected
    kind = LayerKind("x", 4, True, 32, torch.bfloat16, (K, K), (K, K), True, True)
    assert choose_path(kind, None, config.timed_path)[0] == expected
    assert choose_path(kind, FUSED, config.timed_path)[0] == FUSED  # what is forced stays


def test_a_path_that_is_not_there_is_not_taken_for_its_speed(monkeypatch):
    def none(*_):
        raise select.NoKernel("none here")

    monkeypatch.setattr(select, "find_kernel", none)
    kind = LayerKind("x", 4, True, 32, torch.bfloat16, (K, K), (K, K), True, True)
    assert choose_path(kind, None, SEPARATE)[0] == FUSED


@pytest.mark.parametrize("change", [{"group_size": 48}, {"group_size": None}, {"serving_path": "dense"}])
def test_nothing_is_timed_where_nothing_is_to_choose(machine, monkeypatch, change):
    machine(True)
    monkeypatch.setattr(amx, "faster_path", None)
    quantization = {"quant_method": "qalora", "bits": 4, "group_size": 32, "format_version": 1}
    assert QALoraConfig.from_config(quantization | change).timed_path is None


def test_a_kernel_that_quantizes_activations_is_not_compared(machine, monkeypatch):
    """As vLLM's does with AMX, if not told otherwise: it would be fast, and less exact."""
    machine(True)
    monkeypatch.setitem(envs.environment_variables, "VLLM_CPU_INT4_W4A8", lambda: True)
    monkeypatch.setattr(amx, "faster_path", None)
    config = QALoraConfig.from_config({"quant_method": "qalora", "bits": 4, "group_size": 32, "format_version": 1})
    assert config.timed_path is None


def test_nothing_is_timed_without_amx(machine, monkeypatch):
    machine(False)
    monkeypatch.setattr(amx, "faster_path", None)
    assert QALoraConfig.from_config({"quant_method": "qalora", "bits": 4, "group_size": 32}).timed_path is None
