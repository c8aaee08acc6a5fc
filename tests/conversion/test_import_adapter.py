"""Adapters of PEFT's ``use_qalora``: imported, they add what PEFT's own forward adds, unmerged and merged."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base
from support.peft_pooled import dense_twin, make_peft_qalora
from transformers import AutoModelForCausalLM

from qalora_plugin import load_adapter, load_base
from qalora_plugin.conversion.import_adapter import import_peft
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.verifying import verify
from qalora_plugin.formats.official import OFFICIAL
from qalora_plugin.formats.peft_qalora import PEFT_QALORA

TOKENS = torch.randint(4, 100, (2, 60), generator=torch.Generator().manual_seed(0))
CASES = {  # of the base, of the adapter
    "plain": ({}, {}),
    "K/g² is no power of two": ({"hidden": 96}, {}),
    "one group": ({"group_size": -1, "hidden": 64}, {"group_size": 64, "target_modules": ["q_proj"]}),
    "pools two groups": ({"group_size": 16}, {"group_size": 32}),
    "patterns": ({}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3}, "use_rslora": True}),
    "biases, partly dense": ({"bias": True, "dense": ("layers.1.mlp",)}, {"target_modules": ["q_proj", "o_proj"]}),
    "g_idx stored in order, 3 bits": ({"bits": 3}, {}),
    "no g_idx": ({"store_g_idx": False}, {}),
}


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("case", CASES)
def test_adds_what_peft_adds(tmp_path, case):
    base_options, lora = CASES[case]
    base = make_base(tmp_path / "base", **base_options)
    wanted = logits(make_peft_qalora(base, tmp_path / "peft", **lora))
    assert (wanted - logits(dense_twin(base).eval())).abs().max() > 0.02  # or the comparison would see no adapter
    result = import_peft(tmp_path / "peft", tmp_path / "ours", base)
    found = logits(load_adapter(load_base(base, dtype=torch.float32), result.folder).eval())
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    merged = merge(base, result.folder, tmp_path / "merged", "float32", progress=False).folder
    found = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval())
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_is_an_adapter_of_ours(base, tmp_path):
    make_peft_qalora(base, tmp_path / "peft")
    result = import_peft(tmp_path / "peft", tmp_path / "ours", base)
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "QALORA"
    assert config["base_model_name_or_path"] == str(base)
    assert config["qalora"]["group_size"] == 32
    assert config["qalora"]["model_class"] == "LlamaForCausalLM"
    assert len(config["target_modules"]) == result.modules == 10
    assert (
        config.keys() <= json.loads((make_adapter(base, tmp_path / "own") / "adapter_config.json").read_text()).keys()
    )
    merged = merge(base, result.folder, tmp_path / "merged", progress=False).folder
    assert verify(base, result.folder, merged, [TOKENS[0].tolist()], device="cpu", progress=False).passed
    assert "10 linears, rank 4; PEFT's use_qalora pooled 32 columns" in result.summary()[0]
    assert str(base) in result.summary()[1]


def test_the_base_is_the_one_that_the_config_names(base, tmp_path):
    make_peft_qalora(base, tmp_path / "peft")
    assert import_peft(tmp_path / "peft", tmp_path / "ours").base == str(base)
    edit(tmp_path / "peft", base_model_name_or_path=None)
    with pytest.raises(QALoraError, match=r"does not name its base\. Pass it: --base BASE"):
        import_peft(tmp_path / "peft", tmp_path / "out")


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED_CONFIGS = {
    "no pooling": ({"use_qalora": False}, r"use_qalora is False, expected true.*served unmerged"),
    "ours": ({"peft_type": "QALORA"}, "peft_type is 'QALORA', expected 'LORA'.*need no import"),
    "no group size": ({"qalora_group_size": None}, "qalora_group_size is None, expected a positive integer"),
    "dora": ({"use_dora": True}, "use_dora is True: DoRA scales whole columns"),
    "biases": ({"bias": "all"}, "bias is .all.: a merged checkpoint keeps the base's biases"),
    "a head": ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*: a dense copy"),
    "aLoRA": ({"alora_invocation_tokens": [3]}, r"alora_invocation_tokens is \[3\]: it is another form of LoRA"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': it rewrites the base weight"),
    "another rank": ({"r": 8}, r"lora_A of model\.layers\.0\.\S+ is \(4, \d\), lora_B .*expected rank 8"),
    "another group size": ({"qalora_group_size": 64}, "so it pooled 32, but its config says 64"),
    "alpha": ({"lora_alpha": "8"}, "lora_alpha is '8', expected a finite number"),
}


@pytest.fixture(scope="module")
def peft_adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    make_peft_qalora(base, folder)
    return folder


@pytest.fixture
def own(peft_adapter, tmp_path):
    return shutil.copytree(peft_adapter, tmp_path / "peft")


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_refuses_what_a_merge_cannot_hold(base, own, tmp_path, case):
    changes, match = REFUSED_CONFIGS[case]
    edit(own, **changes)
    with pytest.raises(QALoraError, match=match):
        import_peft(own, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


REFUSED_BASES = {
    "act-order": ({"act_order": True}, "in act-order.*pools neighbours.*without act-order"),
    "wider groups": ({"group_size": 64}, "pooled 32 columns of .*have 64.*Train with a multiple of 64"),
    "dense": ({"dense": ("o_proj",)}, r"adapts model\.layers\.0\.self_attn\.o_proj, which .* does not quantise"),
    "another width": ({"hidden": 128}, "expected rank 4, 128 rows of B and a divisor of 256 columns of A"),
}


@pytest.mark.parametrize("case", REFUSED_BASES)
def test_refuses_bases_whose_groups_it_pools_across(own, tmp_path, case):
    options, match = REFUSED_BASES[case]
    base = make_base(tmp_path / "base", **options)
    with pytest.raises(QALoraError, match=match):
        import_peft(own, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_act_order_that_changes_nothing_is_none(own, tmp_path):
    """One group has no order."""
    base = make_base(tmp_path / "base", group_size=-1, act_order=True)
    make_peft_qalora(base, tmp_path / "wide", group_size=64, target_modules=["q_proj"])
    assert import_peft(tmp_path / "wide", tmp_path / "out", base).pooled == 64


def test_pickles_are_refused_with_the_command_that_converts_them(base, own, tmp_path):
    tensors = load_file(own / "adapter_model.safetensors")
    (own / "adapter_model.safetensors").unlink()
    torch.save(tensors, own / "adapter_model.bin")
    with pytest.raises(QALoraError, match=r"as a pickle .*never read\. Convert it: python -c") as error:
        import_peft(own, tmp_path / "out", base)
    command = str(error.value).partition("Convert it: ")[2]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert import_peft(own, tmp_path / "out", base).modules == 10


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "no pooled adapter weight"),
        (lambda t: dict(list(t.items())[1:]), "lacks A or B"),
        (lambda t: {k: v * float("nan") for k, v in t.items()}, "NaN or Inf"),
        (lambda t: {k: v.double() * 1e300 for k, v in t.items()}, "exceeds what float32 can hold"),
        (lambda t: {k: v[0] if "lora_A" in k else v for k, v in t.items()}, r"is \(\d,\), lora_B"),
        (lambda t: {k: v.repeat_interleave(32, 1) if "lora_A" in k else v for k, v in t.items()}, "an ordinary LoRA"),
        (lambda t: {k: v.int() for k, v in t.items()}, "is I32, expected a float type"),
    ],
)
def test_refuses_damaged_weights(own, tmp_path, change, match):
    base = make_base(tmp_path / "base", hidden=64, group_size=32)
    tensors = {
        name: tensor.contiguous() for name, tensor in change(load_file(own / "adapter_model.safetensors")).items()
    }
    save_file(tensors, own / "adapter_model.safetensors")
    with pytest.raises(QALoraError, match=match):
        import_peft(own, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "factor"), [(PEFT_QALORA, 4096 / 32**2), (OFFICIAL, 1 / 32)], ids=["peft", "official"]
)
def test_factors(kind, factor):
    """Of 4096 columns, 32 pooled together."""
    assert kind.factor(4096, 32) == factor


def test_merging_it_says_how_to_import_it(base, peft_adapter, tmp_path):
    with pytest.raises(QALoraError, match=r"pools sum·K/g² instead of the sum.*qalora import peft ADAPTER OUT"):
        merge(base, peft_adapter, tmp_path / "out", progress=False)
