"""A quantised ``lm_head`` inside vLLM's own layer."""

import pytest
import torch
from support.vllm_layers import K, assert_close, config_for, expected, linear_tensors, load
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("vocabulary", [1024, 1000])  # vLLM pads it to a multiple of 64
def test_quantized_head(tmp_path, vocabulary, sym):
    tensors = linear_tensors(vocabulary, 0, sym, "gptq", 64)
    bias = tensors.pop("bias")
    config = config_for(tmp_path, {"lm_head": tensors}, "gptq")
    head = ParallelLMHead(vocabulary, K, params_dtype=torch.bfloat16, quant_config=config, prefix="lm_head")
    load(head, tensors)
    head.quant_method.process_weights_after_loading(head)
    assert head.quant_method.kind[0].symmetric == sym
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(9)).bfloat16()
    y = head.quant_method.apply(head, x)[:, :vocabulary]  # as vLLM's logits processor cuts it
    assert_close(y, expected(x, tensors | {"bias": torch.zeros_like(bias)}, "gptq"))


def test_unused_head_of_a_pooling_model(tmp_path):
    """vLLM leaves it on the meta device and still runs the step after loading."""
    tensors = linear_tensors(128, 0, True, "gptq", 64)
    del tensors["bias"]
    config = config_for(tmp_path, {"lm_head": tensors}, "gptq")
    with torch.device("meta"):
        head = ParallelLMHead(128, K, params_dtype=torch.bfloat16, quant_config=config, prefix="lm_head")
    head.quant_method.process_weights_after_loading(head)
