"""``qalora doctor`` in vLLM's environment: what serving will run, by the choice that the layers make."""

import json
import subprocess
import sys

import torch
from support.merged_checkpoints import edit_quantization, make_merged

from qalora_plugin.commands.doctor import diagnose
from vllm_ext.kernels import select


def test_serving_rows_are_the_choice_of_the_layers():
    for row in diagnose().serving:
        bits, group_size = 4, int(row["layers"].split("g ")[1].split(",")[0])
        symmetric = "asymmetric" not in row["layers"]
        kind = select.LayerKind(
            "x", bits, symmetric, group_size, getattr(torch, row["dtype"]), (4096, 4096), (4096, 4096), True, True
        )
        path, kernel = select.choose_path(kind, None)
        assert row["kernel"] == (path if kernel is None else f"{path} ({type(kernel).__name__})")
        assert (row["why_not_faster"] is None) == (path == select.FUSED)


def test_what_the_checkpoint_asks_for_is_what_is_shown(tmp_path):
    folder = make_merged(tmp_path)
    assert {row["kernel"] for row in diagnose(folder).serving} != {"dense"}
    edit_quantization(folder, serving_path="dense")
    assert {row["kernel"] for row in diagnose(folder).serving} == {"dense"}


def test_classes_of_vllm_that_take_no_quantised_model_are_named(tmp_path):
    """Before training and merging, too: they ask the same."""
    folder = make_merged(tmp_path)
    assert not diagnose(folder).notes[:-1]
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"architectures": ["MiniCPM3ForCausalLM"]}))
    assert "vLLM cannot serve a quantised MiniCPM3ForCausalLM: " in diagnose(folder).notes[0]


def test_command_in_a_fresh_process():
    command = [sys.executable, "-c", "from qalora_plugin.commands.cli import app; app()", "doctor", "--json"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    report = json.loads(output[output.index("{") :])
    assert {"vllm", "gptqmodel"} <= set(report["versions"])
    assert len(report["serving"]) == 12
    assert any("Axolotl is not installed here" in note for note in report["notes"])
