"""Real Axolotl commands: both ways to launch, both ways to resume, merge-lora, and what the user sees on a mistake."""

import json
import shutil

import pytest
import torch
from support.axolotl_runs import BIN, command, losses, write_config
from transformers import AutoModelForCausalLM

from qalora_plugin import load_adapter, load_base
from qalora_plugin.eval.verifying import verify

pytestmark = pytest.mark.e2e
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    """An uninterrupted run of 6 steps through ``accelerate launch``, with its terminal output."""
    folder = tmp_path_factory.mktemp("straight")
    output = command(BIN / "accelerate", "launch", "-m", "axolotl.cli.train", write_config(folder, base))
    return folder / "out", output


def test_accelerate_launch_trains_merges_and_proves(base, straight):
    out, output = straight
    assert losses(out)[-1] < losses(out)[0]
    assert len(losses(out, "eval_loss")) >= 2
    assert "qalora verify: PASSED" in output
    report = verify(base, out, out / "merged", device="cpu", max_tokens=512, progress=False)
    assert report.passed
    assert report.modules == 14
    assert "63 of 63 base tensors byte-identical" in (out / "merged" / "README.md").read_text()


def test_merged_is_what_was_trained(base, straight):
    out, _ = straight
    ids = torch.arange(4, 90)[None]
    trained = load_adapter(load_base(base, dtype=torch.float32), out).eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)(ids).logits
    untrained = load_base(base, dtype=torch.float32)(ids).logits
    assert (trained - untrained).abs().max() > 0.1
    assert (trained - merged).abs().max() < 1e-3 * trained.abs().max()


@pytest.mark.parametrize("key", ["resume_from_checkpoint", "auto_resume_from_checkpoints"])
def test_axolotl_train_resumes_bit_identically(base, straight, tmp_path, key):
    out, _ = straight
    (tmp_path / "out").mkdir()
    checkpoint = shutil.copytree(out / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    value = str(checkpoint) if key == "resume_from_checkpoint" else True
    command(BIN / "axolotl", "train", write_config(tmp_path, base, **{key: value, "qalora": {"verify": False}}))
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    assert (tmp_path / "out" / "merged" / "offsets.safetensors").is_file()


def test_merge_lora(base, straight, tmp_path):
    """The command users know: merges exactly, and does nothing if the merge is already there."""
    out, _ = straight
    shutil.copytree(out, tmp_path / "out", ignore=shutil.ignore_patterns("merged", "checkpoint-*"))
    config = write_config(tmp_path, base, qalora={"merge": False, "offset_dtype": "float32"})
    command(BIN / "axolotl", "merge-lora", config)
    merged = tmp_path / "out" / "merged"
    report = verify(base, tmp_path / "out", merged, device="cpu", max_tokens=512, progress=False)
    assert report.passed
    assert report.offset_dtype == "float32"
    assert "nothing to do" in command(BIN / "axolotl", "merge-lora", config)


def test_axolotl_qalora_is_the_same_command(base):
    output = command(BIN / "axolotl", "qalora", "inspect", base, "--json")
    report, _ = json.JSONDecoder().raw_decode(output[output.index("{\n") :])
    assert report["can_be_base"]


def test_plugin_not_listed(base, tmp_path):
    output = command(BIN / "axolotl", "preprocess", write_config(tmp_path, base, plugins=None), code=1)
    assert "Add the plugin that provides this adapter to `plugins:`" in output


def test_plugin_that_cannot_be_imported(base, tmp_path):
    """A part of it fails to import: Axolotl alone would only say "not registered"."""
    config = write_config(tmp_path, base)
    code = (
        "import sys; sys.modules['qalora_plugin.checkpoint.adapter_folder'] = None; "
        f"from axolotl.cli.config import load_cfg; load_cfg({str(config)!r})"
    )
    output = command(BIN / "python", "-c", code, code=1)
    assert "QALoraError: qalora_plugin cannot be imported" in output
    assert "pip install ." in output
