"""Bits a weight, against sums by hand and against the bytes of a folder."""

from dataclasses import replace

import pytest

from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.served_bits import SizeReport, served_bits
from tests.support.fabricate import make_base

PLAIN = GroupwiseSpec("a", 128, 64, bits=4, group_size=32)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 4 + (16 + 4) / 32),
        ({"bits": 2, "group_size": 64}, 2 + (16 + 2) / 64),
        ({"offset_dtype": "float16"}, 4 + (16 + 4 + 16) / 32),
        ({"offset_dtype": "float32", "scales_delta_dtype": "float16"}, 4 + (16 + 4 + 32 + 16) / 32),
        ({"bias_dtype": "float16"}, 4 + (16 + 4) / 32),
    ],
)
def test_by_hand(change, expected):
    assert served_bits([replace(PLAIN, **change)]).bits_a_weight == pytest.approx(expected, abs=1e-12)


def test_the_mean_is_over_weights_not_linears():
    large = replace(PLAIN, in_features=1024, out_features=1024, bits=8)
    small, big = served_bits([PLAIN]), served_bits([large])
    both = served_bits([PLAIN, large])
    assert both.weights == small.weights + big.weights
    assert both.nbytes == small.nbytes + big.nbytes
    assert both.bits_a_weight > 0.9 * big.bits_a_weight


def test_order_of_columns_counts_in_act_order_only():
    spec = replace(PLAIN, has_g_idx=True)
    assert "column order" not in served_bits([spec]).bits
    assert served_bits([spec], act_order=True).bits["column order"] == 32 * 128


def test_equals_the_bytes_on_disk(tmp_path):
    source = QuantizedCheckpoint.open(make_base(tmp_path / "base"))
    stored = sum(
        info.end - info.start
        for name, info in source.files.tensors.items()
        if name.endswith((".qweight", ".qzeros", ".scales"))
    )
    assert served_bits(source.specs.values()).nbytes == stored


def test_something_beside_and_nothing_at_all():
    report = served_bits([PLAIN]).plus("adapter", 8192)
    assert report.bits_a_weight == pytest.approx(4.625 + 1)
    assert str(report) == "5.625 bits a weight (4 codes + 0.5 scales + 0.125 zeros + 1 adapter)"
    assert str(SizeReport(0)) == "no quantized weights"
    assert served_bits([]).bits_a_weight == 0
