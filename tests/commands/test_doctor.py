"""``qalora doctor`` answers with the same questions that choose the kernels."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from support.fabricate import make_base
from transformers import LlamaConfig, LlamaForCausalLM

from qalora_plugin.commands.doctor import diagnose
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.kernels import cpu
from qalora_plugin.kernels.select import example_weight, training_kernel
from qalora_plugin.layers.summary import training_summary

SMALL, LARGE = (64, 64), (1024, 512)


def choice(shape=LARGE, bits=4, group_size=32, act_order=False, dtype=torch.float32):
    return training_kernel(weight(shape, bits, group_size, act_order), dtype)


def weight(shape, bits, group_size, act_order):
    return example_weight(GroupwiseSpec("a layer", *shape, bits, group_size), act_order, "cpu")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ({"bits": 3}, "3-bit codes straddle words"),
        ({"act_order": True}, "act-order scatters"),
        ({"bits": 2, "group_size": 8}, "groups of 8 do not fill whole words of 2-bit codes"),
        ({"shape": SMALL}, "layers below 262144 weights"),
        ({"dtype": torch.float64}, "torch.float64 is neither float32 nor bfloat16"),
    ],
    ids=str,
)
def test_plain_torch_and_why(kind, why):
    found = choice(**kind)
    assert found.kernel.startswith("plain torch unpacks")
    assert why in found.why_not_faster


def test_cpu_kernels(monkeypatch):
    assert choice().kernel == "C++ unpacks, then torch's GEMM in torch.float32"
    for instructions, kernel, why in (
        (1, "C++ multiplies by the packed weight", None),
        (0, "C++ unpacks", "this CPU lacks AVX512-BF16"),
        (2, "C++ unpacks", "with AMX, torch's GEMM is faster"),
    ):
        library = type("Library", (), {"qalora_bfloat16": staticmethod(lambda found=instructions: found)})
        monkeypatch.setattr(cpu, "library", lambda library=library: library)
        found = choice(dtype=torch.bfloat16)
        assert found.kernel.startswith(kernel)
        assert why is None or why in found.why_not_faster
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert "install g++" in choice().why_not_faster


def test_the_answer_is_what_runs():
    """For a weight of every kind: what is said to be C++ is what the kernels take."""
    for bits in (2, 3, 4, 8):
        for act_order in (False, True):
            for shape in (SMALL, LARGE):
                asked = weight(shape, bits, 32, act_order)
                for dtype in (torch.float32, torch.bfloat16):
                    kernel = training_kernel(asked, dtype).kernel
                    assert kernel.startswith("C++ multiplies") == (cpu.why_not_multiply(asked, dtype) is None)
                    assert kernel.startswith("plain torch") == (cpu.why_not_fill(asked, dtype) is not None)


@pytest.mark.parametrize("named", ["", "env g++", "g++"])
def test_the_compiler_is_the_one_that_compiles(monkeypatch, named):
    """CXX may hold more than a name, as make takes it, or nothing."""
    monkeypatch.setenv("CXX", named)
    assert diagnose().compiler == shutil.which((named or "c++").split()[0])
    monkeypatch.delenv("CXX")
    assert diagnose().compiler == shutil.which("c++")


def test_of_a_checkpoint(tmp_path):
    found = diagnose(make_base(tmp_path / "base", group_size=-1, sym=True, dense=("k_proj",)))
    assert {row["layers"] for row in found.training} == {"4 bit, g -1, symmetric"}
    assert any("vLLM runs q_proj, k_proj, v_proj as one layer" in note for note in found.notes)
    small = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=32)
    LlamaForCausalLM(small).save_pretrained(tmp_path / "dense")
    with pytest.raises(QALoraError, match="it is dense"):
        diagnose(tmp_path / "dense")


def test_command_in_a_fresh_process(base):
    command = [sys.executable, "-c", "from qalora_plugin.commands.cli import app; app()", "doctor"]
    report = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert report["versions"]["torch"] == version("torch")
    assert report["versions"]["axolotl"] == version("axolotl")
    assert report["loads_merged_without_import"] == "load in any tool, without an import"
    assert len(report["training"]) == 12
    assert report["serving"] == []
    assert "vLLM is not installed here" in report["notes"][0]
    shown = subprocess.run([*command, base], capture_output=True, text=True, check=True).stdout
    assert "plain torch" in shown


def test_summary_of_a_model(base):
    from qalora_plugin import load_base

    (line,) = training_summary(load_base(base, dtype=torch.float32), torch.float32)
    assert line.startswith("14 packed linears in torch.float32: plain torch unpacks")


def test_a_broken_vllm_is_what_it_reports(monkeypatch, tmp_path):
    (tmp_path / "vllm.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    (row,) = diagnose().serving
    assert row["why_not_faster"].startswith("vLLM cannot be imported here: ImportError: libcudart.so.13")
