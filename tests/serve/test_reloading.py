"""vLLM's ``reload_weights``: another merge of the base is served as it is, or refused; memory is dirty where vLLM takes
it anew."""

from types import SimpleNamespace

import pytest
import torch
from support.vllm_layers import K, assert_close, config_for, expected, linear_tensors, load
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from qalora_plugin.core.errors import QALoraError

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
