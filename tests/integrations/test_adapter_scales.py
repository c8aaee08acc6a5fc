"""Adapters that train scales, in PEFT: their learning rate, every path through the layer, saving and resuming."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig
from peft.helpers import rescale_adapter_scale
from support.fabricate import make_adapter, make_base
from support.steps import IDS

from qalora_plugin import QALoraConfig, add_adapter, load_adapter, load_base
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.core import reference
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraLayer

OPTIONS = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("scales") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("scales") / "adapter", std=0.1, scales=True, **OPTIONS)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QALoraLayer)}


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def expected_output(layer, x, names):
    """float64, of the active adapters ``names``."""
    base = layer.get_base_layer()
    weight = reference.dequantize(base.quantized)
    group = reference.column_groups(base.quantized)
    still = reference.dequantize(base.quantized._replace(offsets=None))
    for name in names:
        ratios = layer.ratios[name]
        a, b = (ratios.offsets * part[name].weight.double() for part in (layer.lora_A, layer.lora_B))
        if name in layer.lora_D:
            d, c = (ratios.scales * part[name].weight.double() for part in (layer.lora_D, layer.lora_C))
            weight = weight + still * (d @ c)[group]
            offsets = reference.adapter_offsets(a, b, layer.scaling[name], base.quantized.scales)
        else:
            offsets = reference.adapter_offsets(a, b, layer.scaling[name])
        weight = weight + offsets[group]
    return x.double() @ weight


def test_untouched_until_it_is_trained(base):
    """C starts at zero, D as A does; shapes, and what trains."""
    plain, model = load_base(base, dtype=torch.float32), load_base(base, dtype=torch.float32)
    expected = plain(IDS).logits
    model = add_adapter(model, scales=True, rank_pattern={"q_proj": 2}, **OPTIONS)
    assert torch.equal(model(IDS).logits, expected)
    assert model.peft_config["default"].qalora | {"base_fingerprint": 0} == {
        "format_version": 2, "pooling": "sum", "group_size": 32, "model_class": "LlamaForCausalLM",
        "base_fingerprint": 0, "scales": True, "scales_lr_ratio": 1.0, "offsets_lr_ratio": 3.0,
    }  # fmt: skip
    for name, layer in layers(model).items():
        rank, d, c = 2 if "q_proj" in name else 4, layer.lora_D["default"].weight, layer.lora_C["default"].weight
        n, groups = layer.out_features, layer.get_base_layer().groups
        assert (d.shape, c.shape) == ((groups, rank), (rank, n))
        assert d.requires_grad
        assert c.requires_grad
        assert 0.5 * groups**-0.5 < d.abs().max() <= groups**-0.5
        assert 0.5 * groups**-0.5 < 3 * layer.lora_A["default"].weight.abs().max() <= groups**-0.5


def test_off_is_the_adapter_of_always(base, tmp_path):
    one = make_adapter(base, tmp_path / "one", **OPTIONS)
    other = make_adapter(base, tmp_path / "other", scales=False, **OPTIONS)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes()
    assert json.loads((one / "adapter_config.json").read_text())["qalora"]["format_version"] == 1


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-2),
}


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_learns_as_parameter_groups_would(optimizer):
    """Ratio 5, against plain factors at five times the rate."""
    from support.layers import make_layer

    config = QALoraConfig(r=4, lora_alpha=8, qalora={"scales": True, "scales_lr_ratio": 5.0})
    ours, theirs = (
        QALoraLayer(make_layer(64, 32, 4, 32), "default", config_of, 4, 8)
        for config_of in (config, QALoraConfig(r=4, lora_alpha=8, qalora={"scales": True, "scales_lr_ratio": 1.0}))
    )
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for parameter in theirs.parameters():
        parameter.data *= 5
    steps = [OPTIMIZERS[optimizer]([{"params": list(layer.parameters())}]) for layer in (ours, theirs)]
    steps[1].param_groups[0]["lr"] *= 5
    x, wanted = torch.randn(20, 64), torch.randn(20, 32)
    for i in range(5):
        for layer, step in zip((ours, theirs), steps, strict=True):
            torch.manual_seed(i)  # of the tokens that are sampled
            step.zero_grad()
            (layer(x) - wanted).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
            step.step()
    for part in ("lora_A", "lora_B", "lora_D", "lora_C"):
        one, other = (getattr(layer, part)["default"].weight for layer in (ours, theirs))
        torch.testing.assert_close(5 * one, other, rtol=1e-4, atol=1e-6)
    assert ours.lora_C["default"].weight.abs().max() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_path_computes_the_definition(base, dropout):
    model = randomise(add_adapter(load_base(base, dtype=torch.float32), scales=True, lora_dropout=dropout, **OPTIONS))
    first = model.peft_config["default"].qalora
    model.add_adapter("fast", QALoraConfig(qalora=first | {"scales_lr_ratio": 2.0}, **OPTIONS))
    plain = {key: value for key, value in first.items() if "scales" not in key} | {"format_version": 1}
    model.add_adapter("plain", QALoraConfig(qalora=plain, **OPTIONS))
    randomise(model).eval()
    for layer in layers(model).values():
        x = torch.randn(3, layer.get_base_layer().in_features)
        for active in (["default"], ["default", "fast"]):
            layer.set_adapter(active)
            expected = expected_output(layer, x, active)
            assert (layer(x).double() - expected).norm() <= 1e-6 * expected.norm()
        layer.set_adapter(["plain", "fast"])
        assert layer(x).isfinite().all()
        layer.enable_adapters(False)
        assert torch.equal(layer(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("rslora", [False, True])
def test_what_scales_an_adapter_scales_all_of_it(base, rslora):
    """PEFT's ``rescale_adapter_scale`` and ``set_scale`` lie between the base (0) and the adapter (1)."""
    wish = LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules=["q_proj"])
    model = randomise(add_adapter(load_base(base, dtype=torch.float32), wish, scales=True))
    layer = next(iter(layers(model).values()))
    x = torch.randn(3, layer.get_base_layer().in_features)
    none, whole = layer.get_base_layer()(x), layer(x)
    for strength in (0.0, 0.5):
        expected = none + strength * (whole - none)
        with rescale_adapter_scale(model, strength):
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x), whole)
        layer.set_scale("default", strength)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        layer.set_scale("default", 1.0)


def test_dropout_is_the_offsets_alone(base):
    model = add_adapter(load_base(base, dtype=torch.float32), scales=True, lora_dropout=0.5, **OPTIONS)
    layer = next(iter(layers(randomise(model).train()).values()))
    layer.lora_B["default"].weight.data.zero_()
    x = torch.randn(3, layer.get_base_layer().in_features)
    torch.testing.assert_close(layer(x).double(), expected_output(layer, x, ["default"]), rtol=1e-5, atol=1e-5)


def test_save_load_and_delete(base, adapter, tmp_path):
    model = load_adapter(load_base(base, dtype=torch.float32), adapter, is_trainable=True)
    assert sum(p.requires_grad for p in model.parameters()) == 4 * len(layers(model))
    model.save_pretrained(tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        first, again = ((folder / file).read_bytes() for folder in (adapter, tmp_path / "again"))
        assert first == again
    opened = AdapterFolder.open(adapter)
    for name, layer in layers(model).items():
        found = opened.scale_factors(name.removeprefix("base_model.model."))
        for factor, part in zip(found, (layer.lora_D, layer.lora_C), strict=True):
            assert torch.equal(torch.from_numpy(factor), part["default"].weight.double())
        a, _ = opened.factors(name.removeprefix("base_model.model."))
        assert torch.equal(torch.from_numpy(a), 3 * layer.lora_A["default"].weight.double())
    with pytest.raises(QALoraError, match="PEFT would leave out"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(QALoraError, match="PEFT would leave out of the conversion"):
        model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(adapter))
    assert list(model.peft_config) == ["default"]
    model.delete_adapter("default")
    assert not any("lora_D" in name for name, _ in model.named_parameters())


def test_resumed_training_is_bit_identical(base, tmp_path):
    def train(model, state, steps):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if state:
            optimizer.load_state_dict(deepcopy(state))
        for i in range(steps):
            torch.manual_seed(i)  # of the tokens that are sampled; trainers put the generator's state back
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return deepcopy(optimizer.state_dict())

    torch.manual_seed(0)
    model = add_adapter(load_base(base, dtype=torch.float32), scales=True, **OPTIONS)
    state = train(model, None, 2)
    model.save_pretrained(tmp_path / "middle")
    train(model, state, 2)
    model.save_pretrained(tmp_path / "through")
    resumed = load_adapter(load_base(base, dtype=torch.float32), tmp_path / "middle", is_trainable=True)
    train(resumed, state, 2)
    resumed.save_pretrained(tmp_path / "resumed")
    first, again = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("through", "resumed"))
    assert first == again


def test_get_peft_model_takes_the_wish(base):
    """As trainers of TRL call it."""
    from peft import get_peft_model

    config = QALoraConfig(qalora={"scales": True, "scales_lr_ratio": 2}, task_type="CAUSAL_LM", **OPTIONS)
    model = get_peft_model(load_base(base, dtype=torch.float32), config)
    assert all(layer.ratios == {"default": (3.0, 2.0)} for layer in layers(model).values())


@pytest.mark.parametrize(
    ("wish", "match"),
    [
        ({"scales": "yes"}, "scales: 'yes', expected true or false"),
        ({"scales": True, "scales_lr_ratio": 0}, "scales_lr_ratio 0, expected a positive number"),
        ({"scales": True, "scales_lr_ratio": True}, "expected a positive number"),
        ({"scales_lr_ratio": 3}, "scales is not true"),
    ],
)
def test_bad_wishes(base, wish, match):
    with pytest.raises(QALoraError, match=match):
        QALoraConfig(qalora=wish, **OPTIONS)
    with pytest.raises(QALoraError, match=match):
        add_adapter(load_base(base), LoraConfig(**OPTIONS), **wish)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 1}, "format_version 1, but qalora.scales is True"),
        ({"scales": False, "scales_lr_ratio": None}, "format_version 2, but qalora.scales is False"),
        ({"scales_lr_ratio": None}, "with the ratio None"),
        ({"format_version": 3}, "reads 1 and 2"),
        ({"format_version": 1, "scales": None, "scales_lr_ratio": None}, "holds trained scales of .* does not say so"),
    ],
)
def test_edited_folders(adapter, tmp_path, change, match):
    folder = shutil.copytree(adapter, tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    changed = config["qalora"] | change
    config["qalora"] = {key: value for key, value in changed.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(QALoraError, match=match):
        AdapterFolder.open(folder)


def test_axolotl_goes_on_with_what_the_adapter_has(base, adapter, tmp_path):
    from qalora_plugin.integrations.axolotl.args import read_block
    from qalora_plugin.integrations.axolotl.preflight import check_axolotl

    cfg = {"adapter": "qalora", "base_model": str(base), "lora_model_dir": str(adapter), "output_dir": str(tmp_path)}
    check_axolotl(cfg)
    check_axolotl(cfg | {"qalora": {"scales": True}})
    with pytest.raises(QALoraError, match=r"qalora\.scales is false, but lora_model_dir .* was trained with scales"):
        check_axolotl(cfg | {"qalora": {"scales": False}})
    check_axolotl(cfg | {"qalora": {"scales": True, "scales_lr_ratio": 1}})
    with pytest.raises(QALoraError, match=r"scales_lr_ratio is 5, but lora_model_dir .* was trained with 1"):
        check_axolotl(cfg | {"qalora": {"scales": True, "scales_lr_ratio": 5}})
    with pytest.raises(QALoraError, match=r"scales is not true: nothing would learn faster"):
        read_block({"scales_lr_ratio": 3})
    with pytest.raises(QALoraError, match=r"scales_lr_ratio -1\.0, expected a positive number"):
        read_block({"scales": True, "scales_lr_ratio": -1})


def test_older_adapters_name_one_ratio_for_all(base, adapter, tmp_path):
    """Their offsets' factors are divided by it, too."""
    folder = shutil.copytree(adapter, tmp_path / "older")
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["qalora"]["offsets_lr_ratio"]
    config["qalora"]["scales_lr_ratio"] = 3.0
    (folder / "adapter_config.json").write_text(json.dumps(config))
    older, newer = AdapterFolder.open(folder), AdapterFolder.open(adapter)
    for name in newer.modules:
        for ours, theirs in zip(older.factors(name), newer.factors(name), strict=True):
            assert (ours == theirs).all()
        for ours, theirs in zip(older.scale_factors(name), newer.scale_factors(name), strict=True):
            assert (ours == 3 * theirs).all()
    for layer in layers(load_adapter(load_base(base), folder)).values():
        assert layer.ratios["default"] == (3.0, 3.0)
