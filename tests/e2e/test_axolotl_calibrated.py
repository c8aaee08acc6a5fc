"""``qalora: {init: calibrated}`` through Axolotl: what validation refuses, and a run that starts so and is resumed."""

import json
import shutil

import pytest
import torch
from axolotl.cli.config import load_cfg
from safetensors.torch import load_file
from support.axolotl_runs import train_here, write_config, write_instructions
from support.fabricate import make_base
from support.two_processes import report, train_as_two, trained

from qalora_plugin import QALoraPlugin
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.core.errors import QALoraError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    base = make_base(folder / "base", bits=3, twin=folder / "dense")
    return base, folder / "dense", write_instructions(folder / "text.jsonl")


def options(folders, **changes):
    return {"init": "calibrated", "init_model": str(folders[1]), "init_dataset": str(folders[2]), **changes}


ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("changes", "block", "message"),
    [
        ({}, {"init_model": None}, "qalora.init is calibrated, but init_model is missing"),
        ({"rl": "dpo"}, {}, "rl: dpo, whose reference is the base without an adapter"),
        ({"deepspeed": ZERO2}, {}, "needs whole layers, and deepspeed shares them out over ranks"),
        (
            {"fsdp_version": 2, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}, {},
            "needs whole layers, and fsdp_config shares them",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_refused(folders, tmp_path, changes, block, message):
    with pytest.raises(QALoraError, match=message):
        load_cfg(str(write_config(tmp_path, folders[0], qalora=options(folders, **block), **changes)))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"init_model": "/nowhere"}, "the folder /nowhere does not exist"),
        ({"init_dataset": "/nowhere/text.jsonl"}, "the text file /nowhere/text.jsonl does not exist"),
    ],
    ids=str,
)
def test_inputs_that_are_not_there_are_missed_where_a_run_starts(folders, tmp_path, block, message):
    """Not by `merge-lora`, `inference`, or a run that is resumed: an adapter that was calibrated needs them no more."""
    settings = {"qalora": options(folders, **block)}
    cfg = load_cfg(str(write_config(tmp_path, folders[0], **settings)))
    for preprocess in (True, False):
        with pytest.raises(QALoraError, match=message):
            QALoraPlugin().load_datasets(cfg, preprocess=preprocess)
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    for resumed in (
        {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-3")},
        {"auto_resume_from_checkpoints": True},
    ):
        cfg = load_cfg(str(write_config(tmp_path, folders[0], **settings, **resumed)))
        assert QALoraPlugin().load_datasets(cfg) is None


def test_another_model_is_refused(folders, tmp_path):
    make_base(tmp_path / "wide", hidden=128, twin=tmp_path / "other")
    make_base(tmp_path / "deep", layers=1, twin=tmp_path / "shallow")
    for model, message in (
        (tmp_path / "other", r"is not the 16-bit model of this base: .*down_proj is 64×128 in the base.* has 128×256"),
        (tmp_path / "shallow", r"is not the 16-bit model of this base: model.layers.1.* has no weight of that name"),
        (folders[0], r"is quantized itself \(gptq\)"),
    ):
        cfg = load_cfg(str(write_config(tmp_path, folders[0], qalora=options(folders, init_model=str(model)))))
        with pytest.raises(QALoraError, match=message):
            QALoraPlugin().load_datasets(cfg)


@pytest.mark.e2e
def test_trained_resumed_and_continued(folders, tmp_path, caplog):
    base = folders[0]
    settings = {"learning_rate": 1e-6, "optimizer": "adamw_torch_fused", "save_total_limit": 4}
    config = write_config(
        tmp_path, base, qalora=options(folders, scales=True, init_samples=8, verify_tokens=256), **settings
    )
    train_here(config)
    out = tmp_path / "out"
    adapter = AdapterFolder.open(out)
    assert adapter.config["qalora"]["init"] == "calibrated"
    before = load_file(out / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 1e-4 for tensor in before.values())  # as it was started, at such a rate
    assert "| exactness | verified" in (out / "merged" / "README.md").read_text()
    write_config(tmp_path, base, qalora=options(folders, scales=True, init_samples=8, merge=False),
                 resume_from_checkpoint=str(out / "checkpoint-3"), **settings)  # fmt: skip
    shutil.rmtree(out / "merged")
    with caplog.at_level("INFO"):
        train_here(config)
    assert "qalora.init: not applied again, for training goes on from" in caplog.text
    after = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((out / "adapter_config.json").read_text())["qalora"]["init"] == "calibrated"

    caplog.clear()
    with caplog.at_level("INFO"):
        load_cfg(str(write_config(tmp_path, base, qalora=options(folders, scales=True), lora_model_dir=str(out))))
    assert "qalora.init: not applied, for lora_model_dir has an adapter" in caplog.text


@pytest.mark.e2e
def test_two_processes_start_alike(folders, tmp_path):
    config = write_config(
        tmp_path, folders[0], qalora=options(folders, init_samples=4, merge=False), lora_r=8, max_steps=1,
        save_steps=1, val_set_size=None, eval_steps=None, learning_rate=1e-9,
    )  # fmt: skip
    train_as_two(config)
    assert {report(config, rank)["backend"] for rank in (0, 1)} == {"gloo"}
    assert all(tensor.abs().max() > 1e-4 for tensor in trained(config).values())
