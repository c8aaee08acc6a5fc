"""What PEFT does to adapters that are loaded: swapped, summed, switched off by their alpha; and wishes for new ones."""

import logging

import pytest
import torch
from peft import prepare_model_for_kbit_training
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from support.fabricate import make_adapter, make_base
from support.steps import IDS

from qalora_plugin import QALoraConfig, add_adapter, load_adapter, load_base, merge, verify
from qalora_plugin.core.errors import QALoraError

OPTIONS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("tools") / "base")


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def loaded(base, adapter, **options):
    return load_adapter(load_base(base, dtype=torch.float32), adapter, **options)


@pytest.mark.parametrize(
    ("scales", "other"),
    [
        (True, {}),
        (True, {"r": 2, "lora_alpha": 4}),
        (False, {"lora_alpha": 32}),
        (False, {"lora_alpha": 5, "r": 2}),
        (False, {"lora_alpha": 5, "r": 8}),
    ],
    ids=str,
)
def test_swapped_for_one_of_its_kind(base, tmp_path, scales, other):
    first, second = (
        make_adapter(base, tmp_path / name, std=0.1, seed=seed, scales=scales, **OPTIONS | options)
        for seed, (name, options) in enumerate((("first", {}), ("second", other)))
    )
    model = loaded(base, first)
    model.peft_config["default"].qalora["init"] = "calibrated"  # what it began with is of the past
    hotswap_adapter(model, str(second), "default")
    wanted = logits(loaded(base, second))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")  # with the rank and alpha that it has now: what a merge goes by
    torch.testing.assert_close(logits(loaded(base, tmp_path / "saved")), wanted, rtol=1e-5, atol=1e-5)


def test_a_swap_for_a_higher_rank_leaves_all_factors_training(base, tmp_path):
    first, second = (
        make_adapter(base, tmp_path / str(rank), scales=True, **OPTIONS | {"r": rank, "lora_alpha": 2 * rank})
        for rank in (2, 4)
    )
    model = loaded(base, first, is_trainable=True)
    names = {name for name, part in model.named_parameters() if part.requires_grad}
    hotswap_adapter(model, str(second), "default")
    assert {name for name, part in model.named_parameters() if part.requires_grad} == names
    assert {name.split(".")[-3] for name in names} == {"lora_A", "lora_B", "lora_C", "lora_D"}


def test_a_swap_of_experts_knows_their_rank(mixtral, tmp_path):
    """Their factors are stacked: the first size is how many there are."""
    options = {"r": 2, "lora_alpha": 8, "target_modules": ["up_proj"]}
    first, second = (make_adapter(mixtral, tmp_path / str(i), std=0.1, seed=i, **options) for i in (0, 1))
    model = loaded(mixtral, first)
    hotswap_adapter(model, str(second), "default")
    model.save_pretrained(tmp_path / "saved")
    wanted = logits(loaded(mixtral, second))
    torch.testing.assert_close(logits(loaded(mixtral, tmp_path / "saved")), wanted, rtol=1e-5, atol=1e-5)


def test_swapped_by_patterns_of_the_same_ranks(base, tmp_path):
    patterns = [{"lora_alpha": alpha, "rank_pattern": {"q_proj": 2}} for alpha in (4, 16)]
    first, second, other = (
        make_adapter(base, tmp_path / str(i), std=0.1, seed=i, **OPTIONS | pattern)
        for i, pattern in enumerate([*patterns, {"rank_pattern": {"q_proj": 8}}])
    )
    model, wanted = loaded(base, first), logits(loaded(base, second))
    hotswap_adapter(model, str(second), "default")
    model.save_pretrained(tmp_path / "saved")
    for found in (model, loaded(base, tmp_path / "saved")):
        torch.testing.assert_close(logits(found), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(QALoraError, match="rank by pattern is"):
        hotswap_adapter(model, str(other), "default")


def test_swapped_in_a_model_that_is_to_be_compiled(base, tmp_path):
    first, second = (make_adapter(base, tmp_path / str(i), std=0.1, seed=i, **OPTIONS) for i in (0, 1))
    model = loaded(base, first)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model.eval(), backend="aot_eager")
    for adapter in (first, second):
        hotswap_adapter(model, str(adapter), "default")
        with torch.no_grad():
            found = compiled(IDS).logits
        torch.testing.assert_close(found, logits(loaded(base, adapter)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"lora_alpha": 32}, r"alpha/rank is \(8.0, \{\}\), of the one that is loaded \(2.0, \{\}\)"),
        ({"rank_pattern": {"q_proj": 2}}, "alpha/rank is"),
        ({"scales": False}, "format_version is 1, of the one that is loaded 2"),
        ({"scales_lr_ratio": 2.0}, "learning rates is"),
    ],
)
def test_not_swapped_for_one_of_another_kind(base, tmp_path, other, match):
    """PEFT would keep the scales of the one that goes, or change how strong they are."""
    first = make_adapter(base, tmp_path / "first", scales=True, **OPTIONS)
    second = make_adapter(base, tmp_path / "second", **OPTIONS | {"scales": True} | other)
    model = loaded(base, first)
    before = logits(model)
    with pytest.raises(QALoraError, match=match):
        hotswap_adapter(model, str(second), "default")
    assert torch.equal(logits(model), before)


def test_not_swapped_for_one_of_another_base(base, tmp_path):
    other = make_base(tmp_path / "base", seed=1)
    first, second = (make_adapter(where, tmp_path / where.parent.name, **OPTIONS) for where in (base, other))
    with pytest.raises(QALoraError, match="base_fingerprint is"):
        hotswap_adapter(loaded(base, first), str(second), "default")


@pytest.mark.parametrize("prepared", [True, False])
def test_what_peft_does_to_other_quantized_bases(base, caplog, prepared):
    """``prepare_model_for_kbit_training`` upcasts all that is not packed: twice the memory, and float32 throughout."""
    model = load_base(base, dtype=torch.bfloat16)
    if prepared:
        model = prepare_model_for_kbit_training(model)
    with caplog.at_level(logging.WARNING):
        add_adapter(model, **OPTIONS)
    assert ("Leave prepare_model_for_kbit_training out" in caplog.text) == prepared


def test_sums_of_adapters(base, tmp_path):
    model = loaded(base, make_adapter(base, tmp_path / "first", std=0.1, **OPTIONS))
    model.load_adapter(make_adapter(base, tmp_path / "second", std=0.1, seed=1, **OPTIONS), "second")
    for kind in ("svd", "ties_svd", "magnitude_prune_svd"):
        with pytest.raises(QALoraError, match=f"'{kind}' takes dense changes apart.*'cat'"):
            model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", kind, density=0.5)
    with pytest.raises(QALoraError, match="'svd' takes dense changes apart"):  # the default
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    found = logits(model)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({"use_rslora": True}, "adapter 'second' has use_rslora, and PEFT would make the sum √rank times as strong"),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "differ in exclude_modules .*Activate the adapters"),
        ({"layers_to_transform": [1]}, "differ in layers_to_transform"),
    ],
)
def test_no_sum_of_which_peft_leaves_something_out(base, tmp_path, other, match):
    model = loaded(base, make_adapter(base, tmp_path / "first", **OPTIONS))
    model.load_adapter(make_adapter(base, tmp_path / "second", **OPTIONS | other), "second")
    with pytest.raises(QALoraError, match=match):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum", combination_type="cat")
    assert list(model.peft_config) == ["default", "second"]


def test_no_sum_of_experts_by_joining(mixtral):
    model = add_adapter(load_base(mixtral), r=2, target_modules="all-linear")
    with pytest.raises(QALoraError, match="'cat' would join experts"):
        model.add_weighted_adapter(["default"], [1.0], "sum", "cat")


@pytest.mark.parametrize("scales", [False, True])
def test_an_alpha_of_zero_switches_offsets_off(base, tmp_path, scales):
    adapter = make_adapter(base, tmp_path / "a", std=0.1, scales=scales, alpha_pattern={"q_proj": 0}, **OPTIONS)
    merged = merge(base, adapter, tmp_path / "merged", offset_dtype="float32", progress=False).folder
    assert verify(base, adapter, merged, sequences=IDS.tolist(), device="cpu", progress=False).passed
    model = loaded(base, adapter, is_trainable=True)
    model.train()(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any() == ("q_proj" not in name or "lora_C" in name or "lora_D" in name), name


@pytest.mark.parametrize(
    ("wish", "match"),
    [
        ({"scale": True}, "qalora: {scale: …}, which is not an option there, expected scales or scales_lr_ratio"),
        ({"scales": True, "init": "calibrated"}, "qalora: {init: …}, which is not an option there"),
        (["scales"], r"qalora is \['scales'\], expected an object"),
        ("scales", "qalora is 'scales', expected an object"),
    ],
)
def test_wishes_that_are_none(wish, match):
    with pytest.raises(QALoraError, match=match):
        QALoraConfig(r=4, qalora=wish)


def test_a_config_made_of_anothers_is_its_own(base):
    model = add_adapter(load_base(base), **OPTIONS)
    bound = model.peft_config["default"].qalora
    config = QALoraConfig(r=2, target_modules=["q_proj"], qalora=bound)
    config.qalora["init"] = "calibrated"
    assert "init" not in bound
