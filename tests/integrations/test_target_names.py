"""Names of experts in a config: those in the model, those on disk, and those of nothing."""

import logging

import pytest
import torch
from support.fabricate import make_base

from qalora_plugin import add_adapter, load_base
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.axolotl.preflight import check_axolotl
from qalora_plugin.integrations.peft.adapter import QALoraLayer

FIELDS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")


def by_axolotl(base, options, folder):
    config = {f"lora_{name}": value for name, value in options.items()}
    if options["target_modules"] == "all-linear":
        config |= {"lora_target_modules": None, "lora_target_linear": True}
    check_axolotl({"base_model": str(base), "lora_r": 4, "lora_alpha": 8, "output_dir": str(folder / "out"), **config})


def by_peft(base, options):
    return add_adapter(load_base(base, dtype=torch.float32), r=4, **options)


@pytest.mark.parametrize(
    ("options", "projections"),
    [
        ({"target_modules": ["gate_proj"]}, ["gate_proj"]),
        ({"target_modules": ["w1", "up_proj"]}, ["gate_proj", "up_proj"]),
        ({"target_modules": ["q_proj", "experts.w1"]}, ["gate_proj"]),
        ({"target_modules": ["block_sparse_moe.experts.w2"]}, ["down_proj"]),
        ({"target_modules": ".*experts.*"}, ["gate_proj", "up_proj", "down_proj"]),
        ({"target_modules": "all-linear", "exclude_modules": ["w1", "experts.w3"]}, ["down_proj"]),
        ({"target_modules": "all-linear", "exclude_modules": ".*experts.*"}, []),
    ],
    ids=str,
)
def test_both_names_of_experts_are_understood(mixtral, tmp_path, caplog, options, projections):
    with caplog.at_level(logging.WARNING):
        by_axolotl(mixtral, options, tmp_path)
    assert "no quantised linear" not in caplog.text
    found = [name for name, module in by_peft(mixtral, options).named_modules() if isinstance(module, QALoraLayer)]
    assert {name.rpartition(".")[2] for name in found if "experts" in name} == set(projections)


def test_a_rank_by_the_name_on_disk(mixtral):
    model = by_peft(mixtral, {"target_modules": "all-linear", "rank_pattern": {"w1": 2}, "alpha_pattern": {"w2": 5}})
    experts = model.base_model.model.model.layers[0].mlp.experts
    assert (experts.gate_proj.r["default"], experts.up_proj.r["default"]) == (2, 4)
    assert experts.down_proj.scaling["default"] == 5 / 4


ALL = {"target_modules": "all-linear"}
ONE, NOTHING = (
    r"is for .*experts\.\d\..* on disk, which is .*experts\.\w+ in the model",
    "no linear of this base is named",
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "experts.2.w3"]}, ONE),
        ({"target_modules": r".*(q_proj|experts\.2\.w3)"}, ONE),
        ({"target_modules": r".*\.(q_proj|w1)"}, ONE),
        (ALL | {"exclude_modules": ["experts.1.w3"]}, ONE),
        (ALL | {"exclude_modules": r".*\.w1"}, ONE),
        (ALL | {"rank_pattern": {r"experts\.3\.w1": 2}}, ONE),
        (ALL | {"alpha_pattern": {"experts.3.w1": 2}}, ONE),
        ({"target_modules": ["q_proj", "w9"]}, NOTHING),
        ({"target_modules": ["q_proj", "experts"]}, NOTHING),
        ({"target_modules": ["q_proj", "experts.99.w1"]}, NOTHING),
        (ALL | {"exclude_modules": ["experts"]}, NOTHING),
        (ALL | {"exclude_modules": ["w9"]}, NOTHING),
        ({"target_modules": ["q_proj", "gate_prj"]}, NOTHING),
        (ALL | {"rank_pattern": {"experts": 2}}, NOTHING),
        (ALL | {"rank_pattern": {"experts.gate_prj": 2}}, NOTHING),
        (ALL | {"alpha_pattern": {"w9": 2}}, NOTHING),
    ],
    ids=str,
)
def test_what_would_be_passed_over_is_refused(mixtral, tmp_path, options, message):
    (field,) = (name for name in FIELDS if options.get(name, "all-linear") != "all-linear")
    for refuse in (lambda: by_axolotl(mixtral, options, tmp_path), lambda: by_peft(mixtral, options)):
        with pytest.raises(QALoraError, match=rf"{field}: .*{message}"):
            refuse()


def test_names_in_lists_for_many_models_are_a_warnings_matter(mixtral, tmp_path, caplog):
    options = {"target_modules": ["q_proj", "w1", "c_attn", "fc1"], "exclude_modules": ["lm_head", "vision_tower"]}
    with caplog.at_level(logging.WARNING):
        by_axolotl(mixtral, options, tmp_path)
    assert "c_attn is no quantised linear of this base" in caplog.text
    assert "w1 is no quantised linear" not in caplog.text
    assert sum(isinstance(module, QALoraLayer) for module in by_peft(mixtral, options).modules()) == 4


@pytest.mark.parametrize("name", ["mlp", "layers.0"])
def test_a_part_of_the_model_in_a_list_excludes_nothing_and_is_warned_of(mixtral, tmp_path, caplog, name):
    options = ALL | {"exclude_modules": [name]}
    for check in (lambda: by_axolotl(mixtral, options, tmp_path), lambda: by_peft(mixtral, options)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check()
        assert f"exclude_modules: {name} is no linear of this base and excludes nothing" in caplog.text


def test_the_router_is_no_target(mixtral, qwen):
    for base in (mixtral, qwen):
        with pytest.raises(QALoraError, match=r"target_modules match .*gate, a \w+Router, which can have no adapter"):
            by_peft(base, {"target_modules": ["q_proj", "gate"]})


def test_a_pattern_of_nothing_on_a_base_without_experts_is_a_warnings_matter(tmp_path, caplog):
    base = make_base(tmp_path / "base", layers=1)
    with caplog.at_level(logging.WARNING):
        by_peft(base, ALL | {"rank_pattern": {"kproj": 2}})
    assert "rank_pattern: kproj matches no quantised linear" in caplog.text


def test_a_pattern_excludes_beside_layers_that_cannot_have_an_adapter(tmp_path):
    """It was refused, with the advice to give a list, which says no parts of a model."""
    model = load_base(make_base(tmp_path / "base", dense=("layers.0.mlp.down_proj",)), dtype=torch.float32)
    model = add_adapter(model, r=4, target_modules="all-linear", exclude_modules=r".*self_attn.*|.*up_proj")
    modules = model.get_base_model().named_modules()
    adapted = {name.partition("layers.")[2] for name, module in modules if isinstance(module, QALoraLayer)}
    assert adapted == {"0.mlp.gate_proj", "1.mlp.gate_proj", "1.mlp.down_proj"}
