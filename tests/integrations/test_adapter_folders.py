"""Folders of adapters that PEFT is given: damaged, of other settings, inside of others."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base

from qalora_plugin import add_adapter, load_adapter, load_base
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraLayer

OPTIONS = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("folders") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("folders") / "adapter", std=0.1, scales=True, **OPTIONS)


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("lora_D", None, "lacks A or B or C or D"),
        ("lora_C", lambda found: found * float("nan"), "NaN or Inf"),
        ("lora_D", lambda found: torch.cat([found, found]), "lora_D of model.layers.0.mlp.down_proj is"),
        ("lora_B", None, "lacks A or B or C or D"),
    ],
)
@pytest.mark.parametrize("is_second", [False, True])
def test_damaged_folders_are_noticed_whatever_loads_them(base, adapter, tmp_path, part, change, match, is_second):
    """PEFT would give a second adapter what it begins with, and say so to nobody."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = f"base_model.model.model.layers.0.mlp.down_proj.{part}.weight"
    found = tensors.pop(key)
    save_file(tensors | ({key: change(found)} if change else {}), folder / "adapter_model.safetensors")
    model = load_adapter(load_base(base), adapter) if is_second else load_base(base)
    with pytest.raises(QALoraError, match=match):
        model.load_adapter(folder, "second") if is_second else PeftModel.from_pretrained(model, folder)


def test_a_folder_inside_of_another(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "inside")
    model = PeftModel.from_pretrained(load_base(base), tmp_path, subfolder="inside")
    assert any(isinstance(module, QALoraLayer) for module in model.modules())
    model = load_adapter(load_base(base), tmp_path, subfolder="inside")
    assert any(isinstance(module, QALoraLayer) for module in model.modules())


@pytest.mark.parametrize(("began", "goes_on"), [("calibrated", None), (None, "calibrated")])
def test_how_an_adapter_began_is_what_it_is_resumed_from(base, tmp_path, began, goes_on):
    models = []
    for init in (began, goes_on):
        models.append(add_adapter(load_base(base), scales=True, **OPTIONS))
        models[-1].peft_config["default"].qalora |= {"init": init} if init else {}
    models[0].save_pretrained(tmp_path)
    models[1].load_adapter(tmp_path, "default", is_trainable=True)
    assert models[1].peft_config["default"].qalora.get("init") == began


def test_a_run_is_not_resumed_with_factors_shared_otherwise(base, tmp_path):
    folder = make_adapter(base, tmp_path / "checkpoint", **OPTIONS)
    model = add_adapter(load_base(base), **OPTIONS)
    model.peft_config["default"].shared_a = True
    with pytest.raises(QALoraError, match="was trained with shared_a: False, this run has another"):
        model.load_adapter(folder, "default", is_trainable=True)


@pytest.mark.parametrize(
    ("began", "goes_on", "match"),
    [
        ({}, {"scales": True}, "was trained without scales, this run trains with scales, scales_lr_ratio 1"),
        ({"scales": True}, {}, "was trained with scales, scales_lr_ratio 1 .*, this run trains without"),
        (
            {"scales": True},
            {"scales": True, "scales_lr_ratio": 5},
            "was trained with scales, scales_lr_ratio 1 .*, this run trains with scales, scales_lr_ratio 5",
        ),
    ],
)
def test_a_run_that_is_resumed_with_other_settings(base, tmp_path, began, goes_on, match):
    """The Trainer loads the numbers alone; they are in other units."""
    folder = make_adapter(base, tmp_path / "checkpoint", **OPTIONS, **began)
    model = add_adapter(load_base(base), **OPTIONS, **goes_on)
    with pytest.raises(QALoraError, match=match):
        model.load_adapter(folder, "default", is_trainable=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules": ["q_proj"]}, r"adapts 14 linears, this run 2; model.layers.0.mlp.down_proj differs"),
        ({"lora_alpha": 800}, r"at rank 4 and alpha/rank 2, this run has rank 4 and 200\. Resume with the settings"),
        ({"use_rslora": True}, r"at rank 4 and alpha/rank 2, this run has rank 4 and 4\."),
        ({"r": 8, "lora_alpha": 16}, r"at rank 4 and alpha/rank 2, this run has rank 8 and 2\."),
        ({"rank_pattern": {"q_proj": 2}}, r"trained model.layers.0.self_attn.q_proj at rank 4 .* has rank 2"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_not_resumed(base, tmp_path, options, match):
    """PEFT reads its weights alone."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    saved = add_adapter(load_base(base), **settings)
    saved.save_pretrained(tmp_path / "saved")
    model = add_adapter(load_base(base), **(settings | options))
    with pytest.raises(QALoraError, match=match):
        model.load_adapter(tmp_path / "saved", "default", is_trainable=True)
    saved.load_adapter(tmp_path / "saved", "default", is_trainable=True)


def test_numbers_of_numpy(base):
    model = add_adapter(load_base(base), r=np.int64(4), lora_alpha=np.float64(8), target_modules="all-linear")
    assert json.dumps(model.peft_config["default"].r) == "4"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 1.5}, "r is 1.5, expected a positive integer"),
        ({"lora_alpha": 0}, "lora_alpha is 0, expected a finite number other than 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, r"alpha_pattern\['q_proj'\] is inf"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] is 0, expected a positive integer"),
        ({"lora_dropout": 2.0}, "lora_dropout is 2.0, expected at least 0 and below 1"),
    ],
)
def test_numbers_with_which_nothing_would_be_trained(base, options, match):
    with pytest.raises(QALoraError, match=match):
        add_adapter(load_base(base), **({"r": 4, "target_modules": "all-linear"} | options))
    with pytest.raises(QALoraError, match=match):  # as TRL does
        get_peft_model(load_base(base), LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | options)))


def test_resized_embeddings_are_refused_of_an_adapter_that_is_trained_on(base, adapter):
    """It was saved with the embeddings, and its merge refused in the end."""
    model = load_base(base)
    model.resize_token_embeddings(130)
    with pytest.raises(QALoraError, match="resized from 128 to 130 tokens"):
        load_adapter(model, adapter, is_trainable=True)
    load_adapter(model, adapter)  # to look at
