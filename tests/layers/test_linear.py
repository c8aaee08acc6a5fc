import pytest
import torch

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.layers.linear import QuantLinear


def test_group_size_must_divide_k():
    with pytest.raises(QALoraError, match="group size 48 does not divide in_features 128"):
        QuantLinear(128, 64, 4, 48)


def test_sizes_must_pack():
    with pytest.raises(QALoraError, match="multiples of 8"):
        QuantLinear(128, 60, 4, 32)


def test_uneven_act_order_is_refused():
    layer = QuantLinear(64, 32, 4, 32)
    layer.g_idx = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(QALoraError, match="exactly 32 columns"):
        layer.finalize()


def test_nothing_trains_and_nothing_is_a_parameter():
    layer = QuantLinear(64, 32, 4, 32, bias=True, offset_dtype=torch.float16)
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"qweight", "qzeros", "scales", "g_idx", "bias", "offsets"}


def test_group_of_minus_one_is_all_of_k():
    assert QuantLinear(64, 32, 4, -1).groups == 1
