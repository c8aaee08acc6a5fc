"""What is loaded into a layer of experts: as much as it was made for, in parameters that vLLM's kernels take."""

import pytest
import torch
from support.vllm_experts import EXPERTS, LEAVES, K, make_experts, make_layer
from vllm.model_executor.parameter import BasevLLMParameter

from qalora_plugin.core.errors import QALoraError
from vllm_ext.linear import QALoraLinearMethod

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("leaf", list(LEAVES))
def test_an_expert_without_what_the_layer_was_made_for_is_refused(leaf):
    """As another merge may be that ``reload_weights`` brings."""
    stored, loaded = make_experts(True, 32), make_experts(True, 32)
    del loaded[1][leaf]["offsets"]
    with pytest.raises(QALoraError, match=rf"lack experts\.1\.{leaf}\.offsets \(served as experts\)"):
        make_layer(loaded, torch.float32, "dense", stored=stored)


@pytest.mark.parametrize("leaf", list(LEAVES))
def test_an_expert_with_more_than_the_layer_was_made_for_is_refused(leaf):
    """What it brought was dropped, beside experts that were served with theirs."""
    stored, loaded = make_experts(True, 32), make_experts(True, 32)
    del stored[1][leaf]["offsets"]
    with pytest.raises(QALoraError, match=rf"hold offsets of experts\.1\.{leaf} \(served as experts\)"):
        make_layer(loaded, torch.float32, "dense", stored=stored)


@pytest.mark.parametrize("group_size", [32, K])
def test_vllms_kernels_get_parameters_of_its_own_kinds(monkeypatch, group_size):
    """Machete, Marlin and others assert it; those of a CPU do not."""
    given = []
    whole = QALoraLinearMethod.process_weights_after_loading
    monkeypatch.setattr(
        QALoraLinearMethod,
        "process_weights_after_loading",
        lambda method, linear: given.append(dict(linear.named_parameters())) or whole(method, linear),
    )
    make_layer(make_experts(False, group_size), torch.float32, "dense")
    assert len(given) == 2 * EXPERTS
    for parameters in given:
        assert all(isinstance(parameter, BasevLLMParameter) for parameter in parameters.values())
        qweight, scales = parameters["qweight"], parameters["scales"]
        assert (qweight.input_dim, qweight.output_dim, qweight.packed_dim, qweight.packed_factor) == (0, 1, 0, 8)
        assert scales.output_dim == 1
