"""The pooled adapter in PEFT: forward, switching, saving, and refusals in both directions."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from support.fabricate import make_adapter, make_base
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoraConfig, add_adapter, load_adapter, load_base, merge
from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraLayer

IDS = torch.arange(4, 100).view(2, 48)
OPTIONS = {"r": 4, "target_modules": "all-linear"}


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QALoraLayer)}


def test_layer_is_the_definition(base, adapter):
    model = load_adapter(load_base(base, dtype=torch.float32), adapter)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    packed = layer.base_layer
    assert layer.lora_A["default"].weight.shape == (4, packed.groups)
    x = torch.randn(2, 5, packed.in_features)
    group = reference.column_groups(packed.quantized)
    lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = reference.adapter_linear(x, packed.dense_weight(), group, lora_a, lora_b, 8 / 4)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_new_adapter_changes_nothing(base):
    model = load_base(base, dtype=torch.float32).eval()
    before = model(IDS).logits
    assert torch.equal(add_adapter(model, r=4, target_modules="all-linear")(IDS).logits, before)


def test_disable_adapter_and_two_adapters(base, adapter, tmp_path):
    other = make_adapter(base, tmp_path / "other", seed=1)
    model = load_adapter(load_base(base, dtype=torch.float32), adapter).eval()
    plain = load_base(base, dtype=torch.float32).eval()(IDS).logits
    first = model(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, plain)
    model.load_adapter(other, "other")
    model.set_adapter("other")
    second = model(IDS).logits
    assert not torch.allclose(first, second)
    model.base_model.set_adapter(["default", "other"])
    layer, x = model.base_model.model.model.layers[1].mlp.up_proj, torch.randn(3, 64)
    both = layer(x) - layer.base_layer(x)
    parts = []
    for name in ("default", "other"):
        model.base_model.set_adapter([name])
        parts.append(layer(x) - layer.base_layer(x))
    torch.testing.assert_close(both, sum(parts), rtol=1e-4, atol=1e-5)


def test_dropout_takes_the_second_path_and_eval_does_not(base):
    model = add_adapter(load_base(base, dtype=torch.float32), r=4, lora_dropout=0.5, target_modules=["up_proj"])
    layer = next(iter(layers(model).values()))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.ones(4, 64)
    model.train()
    torch.manual_seed(0)
    noisy = torch.stack([layer(x) for _ in range(2000)]).mean(0)
    model.eval()
    exact = layer(x)
    assert torch.equal(layer(x), exact)
    assert (noisy - exact).abs().max() < 0.1 * (exact - layer.base_layer(x)).abs().max()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(base, reentrant):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = add_adapter(load_base(base, dtype=torch.float32), r=4, target_modules="all-linear")
        for layer in layers(model).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        model(IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, expected)


def test_saved_folder_names_its_base_and_stock_peft_refuses_it(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "QALORA"
    assert config["use_qalora"]  # what vLLM looks at, and refuses
    assert config["qalora"]["pooling"] == "sum"
    assert config["qalora"]["group_size"] == 32
    assert config["qalora"]["base_fingerprint"].startswith("blake3:")
    assert isinstance(PeftConfig.from_pretrained(adapter), QALoraConfig)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    ours = PEFT_TYPE_TO_CONFIG_MAPPING.pop("QALORA")  # as in a process that never imported this package
    try:
        with pytest.raises(KeyError, match="QALORA"):
            PeftConfig.from_pretrained(adapter)
    finally:
        PEFT_TYPE_TO_CONFIG_MAPPING["QALORA"] = ours


def test_reload_is_bit_equal(base, adapter, tmp_path):
    model = load_adapter(load_base(base, dtype=torch.float32), adapter, is_trainable=True)
    model.save_pretrained(tmp_path / "again")
    first, again = ((folder / "adapter_model.safetensors").read_bytes() for folder in (adapter, tmp_path / "again"))
    assert first == again
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_peft_from_pretrained_works_too(base, adapter):
    model = PeftModel.from_pretrained(load_base(base, dtype=torch.float32), adapter)
    assert len(layers(model)) == 14


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_modules": ["lm_head"]}, r"match no quantised linear .*\(they match lm_head\)"),
        ({"target_modules": ["wqkv"]}, "they match nothing"),
    ],
)
def test_what_cannot_be_merged_is_refused(base, option, match):
    with pytest.raises(QALoraError, match=match):
        add_adapter(load_base(base), **{"r": 4, "target_modules": ["q_proj"], **option})


def test_dense_targets_get_no_adapter(tmp_path, caplog):
    base = make_base(tmp_path / "base", dense=("layers.0",))
    for targets in (["q_proj", "up_proj"], "all-linear"):
        model = add_adapter(load_base(base), r=4, target_modules=targets)
        assert layers(model)
        assert all("layers.1" in name for name in layers(model))
        assert not any("lora" in name and "layers.0" in name for name, _ in model.named_modules())


def test_patterns_and_rslora_scale_as_peft_does(base, tmp_path):
    from qalora_plugin.checkpoint.adapter_folder import AdapterFolder

    options = {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"down_proj": 32},
        "use_rslora": True,
    }
    folder = make_adapter(base, tmp_path / "a", lora_alpha=16, **options)
    model = load_adapter(load_base(base), folder)
    opened = AdapterFolder.open(folder)
    ranks = set()
    for name, layer in layers(model).items():
        module = name.removeprefix("base_model.model.")
        assert opened.scaling(module) == layer.scaling["default"]
        assert opened.rank(module) == layer.r["default"]
        ranks.add(layer.r["default"])
    assert ranks == {2, 4, 6}


def test_plain_lora_config_is_accepted(base):
    model = add_adapter(load_base(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    assert len(layers(model)) == 4
    assert isinstance(model.peft_config["default"], QALoraConfig)


def test_dense_model_has_no_groups():
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=32))
    with pytest.raises(QALoraError, match=r"was not loaded by qalora_plugin.load_base"):
        add_adapter(dense, r=4, target_modules="all-linear")


def test_adapter_of_another_base(adapter, tmp_path):
    other = make_base(tmp_path / "other", seed=5)
    with pytest.raises(QALoraError, match="trained on another base"):
        load_adapter(load_base(other), adapter)
    regrouped = make_base(tmp_path / "g64", group_size=64)
    with pytest.raises(QALoraError, match=r"trained with group size 32, .* has 64"):
        PeftModel.from_pretrained(load_base(regrouped), adapter)


def test_peft_cannot_bring_an_adapter_to_another_base(adapter, tmp_path):
    other = load_base(make_base(tmp_path / "other", seed=5))
    with pytest.raises(QALoraError, match="belongs to another base"):
        PeftModel.from_pretrained(other, adapter, is_trainable=True)


def test_a_merged_model_takes_adapters_of_its_own(adapter, merged):
    """The one that was merged already belongs to the base, not to it."""
    assert add_adapter(AutoModelForCausalLM.from_pretrained(merged), r=4, target_modules="all-linear").peft_config
    model = AutoModelForCausalLM.from_pretrained(merged)
    for attempt in (lambda: load_adapter(model, adapter), lambda: PeftModel.from_pretrained(model, adapter)):
        with pytest.raises(QALoraError, match="another base"):
            attempt()


def test_resized_embeddings_are_refused(base):
    model = load_base(base)
    model.resize_token_embeddings(130)
    with pytest.raises(QALoraError, match="resized from 128 to 130 tokens"):
        add_adapter(model, r=4, target_modules="all-linear")


def test_batches_of_several_adapters_are_refused(base, adapter):
    model = load_adapter(load_base(base, dtype=torch.float32), adapter).eval()
    with pytest.raises(QALoraError, match="one batch runs through one adapter"):
        model(IDS, adapter_names=["default", "__base__"])


def test_in_memory_merge_points_to_the_real_one(base, adapter):
    model = load_adapter(load_base(base), adapter)
    with pytest.raises((QALoraError, ValueError), match=r"qalora merge|gptq quantized"):
        model.merge_and_unload()


def test_editing_the_pooling_is_noticed(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["qalora"]["pooling"] = "mean"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(QALoraError, match="pooling 'mean', expected 'sum'"):
        PeftConfig.from_pretrained(folder)


@pytest.mark.parametrize("module", ["model.layers.1.mlp.up_proj", "up_proj", "model.layers.11.self_attn.q_proj"])
@pytest.mark.parametrize(
    "patterns",
    [
        [],
        ["up_proj"],
        ["proj", "q_proj"],
        [r".*\.up_proj", "up_proj"],
        ["up_proj", r"layers\.1\.mlp\.up_proj"],
        [r"layers\.1\..*", r"layers\.\d+\.self_attn\.[qk]_proj"],
        ["^model.*", "q_proj|up_proj"],
        ["mlp"],
    ],
    ids=str,
)
def test_patterns_match_as_in_peft(patterns, module):
    from peft.utils.other import get_pattern_key

    from qalora_plugin.checkpoint.patterns import matching_pattern

    theirs = get_pattern_key(patterns, module)
    assert matching_pattern(patterns, module) == (theirs if theirs in patterns else None)


def test_a_model_has_one_first_adapter(base, adapter, tmp_path):
    """What PEFT would make of these is nothing, or nonsense, without a word."""
    model = add_adapter(load_base(base), **OPTIONS)
    for again in (lambda: add_adapter(model, **OPTIONS), lambda: load_adapter(model, adapter)):
        with pytest.raises(QALoraError, match=r"has an adapter already\. Put a saved one beside it with"):
            again()
    for again in (
        lambda: model.add_adapter("second", LoraConfig(**OPTIONS)),
        lambda: get_peft_model(model, LoraConfig(**OPTIONS)),
    ):
        with pytest.raises(QALoraError, match="has a LoraConfig that says nothing of its base"):
            again()


def test_what_add_adapter_cannot_mean(base):
    with pytest.raises(QALoraError, match=r"was given a config, and r\. Put these into the config"):
        add_adapter(load_base(base), LoraConfig(**OPTIONS), r=2)
    with pytest.raises(QALoraError, match="no target_modules are given"):
        add_adapter(load_base(base), r=2)


def test_only_bases_take_adapters(tmp_path, adapter):
    make_base(tmp_path / "base", twin=tmp_path / "dense")
    with pytest.raises(QALoraError, match=r"was not loaded by qalora_plugin\.load_base"):
        load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), adapter)


def test_adapters_that_transformers_adds_are_saved_and_loaded(base, tmp_path):
    model = load_base(base, dtype=torch.float32)
    model.add_adapter(LoraConfig(**OPTIONS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "adapter")
    again = load_base(base, dtype=torch.float32)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert merge(base, tmp_path / "adapter", tmp_path / "merged", progress=False).modules == 14
