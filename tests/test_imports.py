"""Whatever a user imports first works, alone in a fresh process, and transformers knows merged checkpoints after it."""

import subprocess
import sys

import pytest
from support.fabricate import make_adapter
from support.import_orders import failures, failures_after, modules, public_names

import qalora_plugin


def test_every_public_name_can_be_imported_first():
    assert failures(public_names()) == {}


def test_every_module_can_be_imported_first():
    packages = ("torch", "transformers.trainer", "transformers.quantizers.auto", "peft", "datasets")
    assert failures_after(packages, modules(qalora_plugin)) == {}


@pytest.mark.parametrize(
    "first",
    [
        "import qalora_plugin",
        "from qalora_plugin import load_base",
        "from qalora_plugin import QALoraMergeCallback",
        "import transformers.quantizers.auto",
        "import transformers.modeling_utils, vllm_ext",
        "import vllm_ext, qalora_plugin.core.errors",
        "import peft",
    ],
)
def test_transformers_loads_merged_checkpoints_whichever_is_imported_first(merged, first):
    code = (
        f"{first}; import qalora_plugin, sys; from transformers import AutoModelForCausalLM; "
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, merged], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "QuantLinear"


@pytest.mark.parametrize(
    "first", ["import qalora_plugin", "import peft", "import torch", "import transformers.trainer"]
)
def test_peft_reads_adapters_whichever_is_imported_first(merged, tmp_path, first):
    """``KeyError: 'QALORA'`` of what PEFT's own documentation begins with."""
    adapter = make_adapter(merged, tmp_path / "adapter")
    code = (
        f"{first}; import sys; from peft import AutoPeftModelForCausalLM, PeftConfig; "
        "print(type(PeftConfig.from_pretrained(sys.argv[1])).__name__); "
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]); "
        "print(type(model.base_model.model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, adapter], capture_output=True, text=True)
    assert done.stdout.split() == ["QALoraConfig", "QALoraLayer"], done.stderr


def test_registers_after_a_registry_that_was_half_imported(merged):
    """transformers may be what imports torch, and torch what calls us: then its registry is not there yet."""
    code = """
import sys, types
from importlib.machinery import PathFinder
import qalora_plugin.registration as registration
sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, registration._WhenImported)]
class InTheMidst:
    def find_spec(self, name, path, target=None):
        if name == "transformers.quantizers.base":  # imported by transformers.quantizers.auto
            assert "transformers.quantizers.auto" in sys.modules
            registration.register_with_transformers()
sys.meta_path.insert(0, InTheMidst())
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code, merged], capture_output=True, text=True)
    assert done.stdout.strip() == "QuantLinear", done.stderr


@pytest.mark.parametrize(
    ("library", "moved"),
    [
        ("transformers", "import sys; sys.modules['qalora_plugin.integrations.transformers.loading'] = None"),
        ("PEFT", "import qalora_plugin.registration as r; r._Config = None"),
    ],
)
def test_a_library_in_which_something_has_moved_can_be_imported(library, moved):
    """Our loader runs inside of its import: an ImportError there was one of ``import transformers``, for every tool."""
    code = f"import qalora_plugin.registration; {moved}; import transformers.modeling_utils, peft; print(1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr
    assert done.stderr.count(f"qalora cannot register with {library}, which works without it") == 1
