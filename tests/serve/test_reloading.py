"""vLLM's ``reload_weights``: another merge of the base is served as it is, or refused; memory is dirty where vLLM takes
it anew."""

from types import SimpleNamespace

import pytest
import torch
from support.vllm_layers import (
    HEAD,
    HEADS,
    KV_HEADS,
    SIZES,
    K,
    assert_close,
    config_for,
    expected,
    finished,
    linear_tensors,
    load,
    run_qkv,
)
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from qalora_plugin.core.errors import QALoraError
from vllm_ext import linear

pytestmark = pytest.mark.usefixtures("one_rank")
EMPTY = torch.empty_strided


def dirty(*args, **kwargs):
    tensor = EMPTY(*args, **kwargs)
    return tensor.fill_(0.25) if tensor.is_floating_point() and not tensor.is_meta else tensor


def tensors(seed, **kind):
    return linear_tensors(64, seed, False, "gptq", 64, **kind)


@pytest.fixture
def reloaded(tmp_path, monkeypatch):
    """What a layer of the first tensors computes once it has the second's, and what these say."""

    def reload(first, second, path="dense", dtype=torch.float32):
        model = torch.nn.Module()
        config = config_for(tmp_path, {"l": first}, "gptq", path)
        model.l = ColumnParallelLinear(K, 64, params_dtype=dtype, quant_config=config, prefix="l")
        record_metadata_for_reloading(model)
        load(model.l, first)
        model.l.quant_method.process_weights_after_loading(model.l)
        x = torch.randn(5, K, generator=torch.Generator().manual_seed(9)).to(dtype)
        assert_close(model.l(x)[0], expected(x, first, "gptq"))
        initialize_layerwise_reload(model)
        load(model.l, second)
        monkeypatch.setattr(torch, "empty_strided", dirty)
        finalize_layerwise_reload(model, SimpleNamespace(dtype=dtype))
        return model.l(x)[0], expected(x, second, "gptq")

    return reload


@pytest.mark.parametrize("path", ["dense", None])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"rank": 4}, {"rank": 2}),
        ({"order_seed": 1}, {"order_seed": 2}),
        ({"scales_dtype": torch.float16}, {"scales_dtype": torch.float16}),
    ],
    ids=str,
)
def test_another_merge_is_served_as_it_is(reloaded, first, second, path):
    dtype = torch.float32 if path == "dense" else torch.bfloat16
    assert_close(*reloaded(tensors(0, **first), tensors(5, **second), path, dtype))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"rank": 2}, {"rank": 4}, "factors of rank 4, and the server was started with rank 2 at most"),
        ({}, {"offset_dtype": None}, r"lack l\.offsets \(served as l\)"),
        ({"scales_dtype": torch.float16}, {}, r"lack l\.scales_delta"),
        ({"rank": 2}, {"offset_dtype": None}, r"lack l\.offsets_a"),
        ({"order_seed": 1}, {}, "of another kind .*act-order"),
    ],
    ids=str,
)
def test_what_the_server_was_not_started_with_is_refused(reloaded, first, second, message):
    with pytest.raises(QALoraError, match=f"{message}.*Start"):
        reloaded(tensors(0, **first), tensors(5, **second))


def qkv(seed, **kinds):
    return {
        part: linear_tensors(size, seed, True, "gptq", 64, **kinds.get(part, {"offset_dtype": None}))
        for part, size in SIZES.items()
    }


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"q": {}, "v": {}}, {"q": {}, "k": {}, "v": {}}, r"hold offsets of attn\.k_proj"),
        (
            {"q": {"scales_dtype": torch.float16}, "k": {}, "v": {}},
            {part: {"scales_dtype": torch.float16} for part in "qkv"},
            r"hold scales_delta of attn\.k_proj",
        ),
        ({"q": {"rank": 4}, "k": {"rank": 2}, "v": {"rank": 4}}, {part: {"rank": 4} for part in "qkv"},
         "factors of rank 4, and the server was started with rank 2 at most"),
        ({"q": {"rank": 4}, "v": {"rank": 4}}, {part: {"rank": 4} for part in "qkv"}, "rank 0 at most"),
    ],
    ids=str,
)  # fmt: skip
def test_a_part_that_gets_more_than_it_was_started_with_is_refused(tmp_path, first, second, message):
    """What k brought was overwritten with zeros, or cut to its first rank, while q and v were served as they are."""
    layer, found, wanted = run_qkv(tmp_path, qkv(0, **first), "gptq", torch.float32, path="dense")
    assert_close(found, wanted)
    again = made(tmp_path, qkv(0, **first))
    again.quant_method.kind = layer.quant_method.kind
    with pytest.raises(QALoraError, match=f"{message}.*Start"):
        finished(again, parts := qkv(5, **second), parts)


def made(folder, parts):
    config = config_for(folder, {f"attn.{part}_proj": tensors for part, tensors in parts.items()}, "gptq", "dense")
    return QKVParallelLinear(
        K, HEAD, HEADS, KV_HEADS, bias=True, params_dtype=torch.float32, quant_config=config, prefix="attn.qkv_proj"
    )


@pytest.mark.parametrize("form", ["auto", "dummy"])
def test_a_layer_that_no_tensor_comes_to_is_refused(tmp_path, monkeypatch, form):
    """It was served as memory happened to be. What is made up is not missed."""
    monkeypatch.setattr(linear, "loads_from_files", lambda: form == "auto")
    layer = made(tmp_path, qkv(0, q={}))
    if form == "dummy":
        for name in ("qweight", "scales", "qzeros", "offsets"):
            getattr(layer, name).data.zero_()
        layer.quant_method.process_weights_after_loading(layer)
    else:
        with pytest.raises(QALoraError, match=r"no tensor was loaded for attn\.qkv_proj: .*files hold none"):
            layer.quant_method.process_weights_after_loading(layer)


def test_a_part_that_the_checkpoint_lacks_is_named(tmp_path):
    """The one that is there was named, and to start the server anew was the advice."""
    parts = qkv(0, q={}, v={})
    del parts["k"]
    with pytest.raises(
        QALoraError, match=r"lacks the qweight of part 2 of attn\.qkv_proj, .* Download or copy it again"
    ):
        finished(made(tmp_path, parts), parts, parts)
