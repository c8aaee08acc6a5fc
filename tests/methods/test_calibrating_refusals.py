"""What a calibrated start refuses, and what it leaves where it is stopped."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qalora_plugin import add_adapter, calibrate, load_adapter, load_base
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.methods import calibrating, dense_source

OPTIONS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SEQUENCES = [torch.randint(4, 100, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 25)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrating")
    return make_base(folder / "base", twin=folder / "dense"), folder / "dense"


def with_adapter(base, **options):
    return add_adapter(load_base(base, dtype=torch.float32), **{**OPTIONS, **options})


def test_refused(folders, tmp_path):
    base, dense = folders
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2)
    )  # fmt: skip
    other.save_pretrained(tmp_path / "other")
    for twin, message in (
        (
            tmp_path / "other",
            r"is not the 16-bit model .*layers.0.mlp.gate_proj is 64×128 here, and .* has one of 64×96",
        ),
        (base, r"is quantized itself \(gptq\). Give the original 16-bit model"),
        (tmp_path / "nowhere", "nowhere"),
    ):
        with pytest.raises(QALoraError, match=message):
            calibrate(with_adapter(base), twin, SEQUENCES)
    with pytest.raises(QALoraError, match="does not exist"):
        calibrate(with_adapter(base), dense, tmp_path / "missing.jsonl")
    with pytest.raises(QALoraError, match="no sequence to calibrate on"):
        calibrate(with_adapter(base), dense, [])
    with pytest.raises(QALoraError, match="has no QA-LoRA adapter"):
        calibrate(load_base(base), dense, SEQUENCES)
    trained = load_adapter(load_base(base), make_adapter(base, tmp_path / "adapter"))
    with pytest.raises(QALoraError, match="is not new: its B is not zero"):
        calibrate(trained, dense, SEQUENCES)
    assert not any("init" in config.qalora for config in trained.peft_config.values())


def test_another_model_of_the_same_sizes(folders, tmp_path):
    make_base(tmp_path / "base", twin=tmp_path / "other", seed=1)
    with pytest.raises(QALoraError, match=r"is not the 16-bit model of this base: .* off by 1\d\d% of their size"):
        calibrate(with_adapter(folders[0]), tmp_path / "other", SEQUENCES, progress=False)


def test_a_model_that_is_damaged(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(QALoraError, match=r"holds NaN or Inf, in model\.layers\.1\.mlp\.up_proj"):
        calibrate(with_adapter(folders[0]), tmp_path / "dense", SEQUENCES, progress=False)
    with pytest.raises(QALoraError, match="has no tokenizer that can be loaded"):
        calibrate(with_adapter(folders[0]), tmp_path / "dense", __file__, progress=False)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "norm.weight", "layers.1.mlp.up_proj.weight"])
def test_a_model_that_lacks_something(folders, tmp_path, name):
    """transformers would make it up at random."""
    folder = shutil.copytree(folders[1], tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.{name}"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QALoraError, match=rf"lacks model.{name} \(1 tensors in all\) of a LlamaForCausalLM"):
        calibrate(with_adapter(folders[0]), folder, SEQUENCES, progress=False)


def test_a_model_whose_later_layers_are_another_one(folders, tmp_path):
    folder = shutil.copytree(folders[1], tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    tensors = {k: torch.randn_like(v) * v.std() if ".layers.1.mlp" in k else v for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QALoraError, match=r"is not the 16-bit model of this base: the weights of model.layers.1.mlp"):
        calibrate(with_adapter(folders[0]), folder, SEQUENCES, progress=False)


@pytest.mark.parametrize(
    ("text", "options", "match"),
    [
        ([[]], {}, "or an empty one"),
        ([], {}, "or an empty one"),
        (["some text"], {}, "is 'some text', expected a list of token ids"),
        ([{"input_ids": [5, 6]}], {}, "expected a list of token ids"),
        ([[5.0, 6.0]], {}, r"is \[5.0, 6.0\], expected a list of token ids"),
        ([[5] * 3000], {}, "has more tokens than the 256"),
        ([[5, 600]], {}, "token 600 is none of the 128 that"),
        ([[5, -1]], {}, "token -1 is none"),
        (__file__, {"samples": 0}, "samples is 0, expected 1 or more"),
        (__file__, {"length": 1}, "length is 1, expected 2 or more"),
        (__file__, {"samples": "3"}, "samples is '3', expected 1 or more"),
        (__file__, {"length": 64.0}, "length is 64.0, expected 2 or more"),
        (None, {}, "text to calibrate on is None, expected a file"),
    ],
)
def test_text_that_is_none(folders, text, options, match):
    with pytest.raises(QALoraError, match=match):
        calibrate(with_adapter(folders[0]), folders[1], text, progress=False, **options)


def test_a_base_whose_scales_were_moved_between_layers(folders, tmp_path):
    """As AWQ does: each linear was brought to the 16-bit one, whose inputs are others, and the model further away."""
    base, dense = folders
    moved = shutil.copytree(base, tmp_path / "base")
    for file in moved.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("layers.0.input_layernorm.weight"):
                tensors[name] = tensors[name] * torch.linspace(0.8, 1.25, len(tensors[name])).to(tensors[name].dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(QALoraError, match=r"layers\.0\.input_layernorm\.weight is another one .*AWQ does that"):
        calibrate(with_adapter(moved), dense, SEQUENCES, progress=False)
    assert calibrate(with_adapter(base), dense, SEQUENCES, progress=False)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_what_stops_half_way_leaves_a_new_adapter(folders, monkeypatch, error):
    """It was half set, and refused as one that is not new."""
    model = with_adapter(folders[0], scales=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    whole = calibrating.moments

    def stopped(*args):
        found = whole(*args)
        yield next(found)
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(calibrating, "moments", stopped)
        with pytest.raises(error):
            calibrate(model, folders[1], SEQUENCES, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "init" not in model.peft_config["default"].qalora
    assert calibrate(model, folders[1], SEQUENCES, progress=False)


def test_what_can_be_known_of_a_hubs_model_is_asked_before_it_is_downloaded(folders, monkeypatch):
    def download(*_, **__):
        pytest.fail("downloaded")

    monkeypatch.setattr(dense_source, "fetch_config", lambda *_, **__: folders[0] / "config.json")
    monkeypatch.setattr(dense_source, "resolve", download)
    with pytest.raises(QALoraError, match=r"some/model is quantized itself \(gptq\)"):
        calibrate(with_adapter(folders[0]), "some/model", SEQUENCES)
    for text, options, message in (
        ("/nowhere.txt", {}, "does not exist"),
        (__file__, {"samples": 0}, "samples is 0"),
        ([[]], {}, "or an empty one"),
    ):
        with pytest.raises(QALoraError, match=message):
            calibrate(with_adapter(folders[0]), "some/model", text, **options)
