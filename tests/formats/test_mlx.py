"""MLX's affine words, scales and biases: dequantized by mlx itself; and what is refused."""

import pytest
import torch
from support.layers import make_layer, reference_weight

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.mlx import Mlx, as_config, group_size, quantization, with_classic_rope

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")


def dequantized(written, bits, size, dtype=None):
    """What mlx makes of it, ``[N, K]``."""
    arrays = [mx.array(written[f"layer.{part}"].numpy()) for part in ("weight", "scales", "biases")]
    found = mx.dequantize(*arrays, group_size=size, bits=bits).astype(mx.float32)
    return torch.tensor(found.tolist())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(
    "options", [{}, {"offsets": True}, {"offsets": torch.float32, "negative_scales": True}], ids=str
)
def test_weights_are_mlxs(bits, size, options):
    layer = make_layer(256, 24 if bits == 4 else 32, bits, size, **options)
    written = Mlx().write("layer", layer.quantized)
    assert written["layer.weight"].dtype == torch.uint32
    assert written["layer.weight"].shape == (layer.out_features, 256 * bits // 32)
    expected = reference_weight(layer).t()
    difference = (dequantized(written, bits, size) - expected).abs().max()
    assert difference <= 2e-7 * expected.abs().max()


def test_biases_are_rounded_once():
    layer = make_layer(128, 32, 4, 32, offsets=True)
    weight = layer.quantized
    exact = weight.offsets.double() - weight.scales.double() * weight.zeros.double()
    for dtype in ("float32", "float16", "bfloat16"):
        written = Mlx(dtype).write("layer", weight)
        stored = getattr(torch, dtype)
        assert torch.equal(written["layer.biases"], exact.t().to(stored))
        assert torch.equal(written["layer.scales"], weight.scales.t().to(stored))


@pytest.mark.parametrize(("size", "written_size"), [(256, 128), (96, 32), (192, 64), (384, 128)])
def test_larger_groups_are_several(size, written_size):
    layer = make_layer(768, 32, 4, size, offsets=True)
    assert group_size(size) == written_size
    written = Mlx().write("layer", layer.quantized)
    assert written["layer.scales"].shape == (32, 768 // written_size)
    expected = reference_weight(layer).t()
    assert (dequantized(written, 4, written_size) - expected).abs().max() <= 2e-7 * expected.abs().max()


def spec(name="model.layers.0.mlp.up_proj", size=32):
    return GroupwiseSpec(name, 768, 32, 4, size)


@pytest.mark.parametrize(
    ("linear", "act_order", "message"),
    [
        (spec(size=16), False, "group size 16; MLX has groups of 32, 64 and 128.*gptq8"),
        (spec(size=48), False, "group size 48"),
        (spec(), True, "is in act-order, which MLX has no index for.*gptq8"),
        (spec("model.layers.0.mlp.experts.3.up_proj"), False, "one expert of many.*gguf"),
    ],
)
def test_what_mlx_has_no_place_for(linear, act_order, message):
    with pytest.raises(Unsupported, match=message):
        Mlx().require(linear, act_order, "somewhere")
    Mlx().require(spec(), False, "somewhere")


def test_beyond_the_dtype():
    weight = make_layer(64, 32, 4, 32).quantized
    huge = weight._replace(scales=weight.scales.float() * 1e5)
    with pytest.raises(
        QALoraError, match=r"layer: its (scales|biases) exceed what float16 can hold. Use dtype float32"
    ):
        Mlx("float16").write("layer", huge)
    assert Mlx().write("layer", huge)
    with pytest.raises(QALoraError, match="dtype is 'int8', expected one of float32, float16, bfloat16"):
        Mlx("int8")


def test_settings_of_single_linears():
    common, own = (GroupwiseSpec(name, 256, 32, bits, 64) for name, bits in (("a", 4), ("c", 8)))
    found = quantization([common, GroupwiseSpec("b", 256, 32, 4, 64), own])
    assert found == {"group_size": 64, "bits": 4, "c": {"group_size": 64, "bits": 8}}


def test_config():
    config = {
        "model_type": "llama", "quantization_config": {"quant_method": "qalora"}, "transformers_weights": "x",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    }  # fmt: skip
    found = as_config(config, [spec()])
    assert found["quantization"] == {"group_size": 32, "bits": 4}
    assert not {"quantization_config", "transformers_weights"} & found.keys()
    assert found["rope_theta"] == 5e5
    assert found["rope_scaling"]["type"] == found["rope_scaling"]["rope_type"] == "llama3"
    assert found["text_config"]["rope_theta"] == 1e6
    assert "rope_scaling" not in found["text_config"]
    assert with_classic_rope({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}})["rope_theta"] == 1.0
    local = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert with_classic_rope({"rope_parameters": local})["rope_local_base_freq"] == 1e4
    for odd in (None, 3, {"full_attention": 3}):
        assert with_classic_rope({"rope_parameters": odd}) == {"rope_parameters": odd}
