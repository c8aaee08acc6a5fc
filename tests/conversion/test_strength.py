"""The picture in a merged card: its figures against the whole weights, and a file that any browser takes."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from support.fabricate import make_adapter, make_base

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.conversion.merging import merge
from qalora_plugin.conversion.strength import PICTURE_NAME, Strength, picture, strengths
from qalora_plugin.core import reference
from qalora_plugin.formats.opened import QuantizedCheckpoint

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """An adapter with scales, its merge, and another one on that."""
    folder = tmp_path_factory.mktemp("chain")
    make_base(folder / "base")
    make_adapter(folder / "base", folder / "first", std=0.1, scales=True)
    merge(folder / "base", folder / "first", folder / "once", progress=False)
    make_adapter(folder / "once", folder / "second", seed=1, std=0.1, target_modules=["up_proj", "q_proj"])
    merge(folder / "once", folder / "second", folder / "twice", progress=False)
    return folder


@pytest.mark.parametrize(("on", "adapter"), [("base", "first"), ("once", "second")])
def test_means_are_those_of_all_weights(chain, on, adapter):
    base, opened = QuantizedCheckpoint.open(chain / on), AdapterFolder.open(chain / adapter)
    found = {one.name: one for one in strengths(base, opened)}  # no more than 16 groups: nothing is sampled
    assert list(found) == opened.modules
    for name in opened.modules:
        scales = base.weight(name).scales.double()
        offsets = reference.adapter_offsets(*map(torch.from_numpy, opened.factors(name)), opened.scaling(name))
        steps = 1 if opened.has_scales else scales.abs()
        assert found[name].offsets == pytest.approx((offsets.abs() / steps).mean().item(), rel=1e-5)
        factors = opened.scale_factors(name)
        expected = None if factors is None else pytest.approx(np.abs(factors[0] @ factors[1]).mean())
        assert found[name].scales == expected


def test_a_sample_is_close(tmp_path):
    base = make_base(tmp_path / "base", hidden=1024, layers=1, dense=("self_attn", "gate_proj", "up_proj"))
    adapter = AdapterFolder.open(make_adapter(base, tmp_path / "adapter"))
    source = QuantizedCheckpoint.open(base)
    ((name, spec),) = source.specs.items()
    assert spec.groups == 64
    offsets = reference.adapter_offsets(*map(torch.from_numpy, adapter.factors(name)), adapter.scaling(name))
    (found,) = strengths(source, adapter)
    assert found.offsets == pytest.approx((offsets.abs() / source.weight(name).scales).mean().item(), rel=0.2)


def test_the_card_shows_it(chain):
    for folder, panels in (("once", 2), ("twice", 1)):
        assert f"]({PICTURE_NAME})" in (chain / folder / "README.md").read_text()
        svg = ElementTree.parse(chain / folder / PICTURE_NAME).getroot()
        titles = [title.text for title in svg.iter(f"{SVG}title")]
        cells = 14 if folder == "once" else 4
        assert len(titles) == panels * cells
        assert any(title.startswith("mlp.up_proj, layer 1: ") for title in titles)
        assert int(svg.get("width")) < 1000


def test_experts_towers_and_hostile_names():
    found = [
        Strength("model.layers.0.mlp.experts.0.up_proj", 1.0, None),
        Strength("model.layers.0.mlp.experts.1.up_proj", 3.0, None),
        Strength("vision_tower.layers.2.fc1", 0.5, None),
        Strength("lm_head", 0.0, None),
        Strength('model.layers.1.<script>"&\x1b', 0.25, None),
        Strength("model.layers.99999999999999.x", 0.1, None),
    ]
    svg = ElementTree.fromstring(picture(found))
    titles = [title.text for title in svg.iter(f"{SVG}title")]
    assert "mlp.experts.up_proj, layer 0: 2" in titles
    assert "vision_tower.fc1, layer 2: 0.5" in titles
    assert '<script>"&\\x1b, layer 1: 0.25' in titles
    assert "lm_head, layer 0: 0" in titles
    assert len(titles) == 5
    assert int(svg.get("width")) < 1000


def test_an_adapter_that_adds_nothing():
    ElementTree.fromstring(picture([Strength("model.layers.0.a", 0.0, 0.0)]))
