"""A calibrated start of a whole adapter: inputs block by block, what is set, what is refused."""

import json

import pytest
import torch
from families.architectures import build
from families.bases import is_to_be_quantized
from rich.progress import Progress
from support.fabricate import make_base
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from qalora_plugin import QALoraConfig, add_adapter, calibrate, load_adapter, load_base, merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.methods import calibrating
from qalora_plugin.methods.block_inputs import blocks_of, moments

OPTIONS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SEQUENCES = [torch.randint(4, 100, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 25)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrating")
    base = make_base(folder / "base", act_order=True, twin=folder / "dense")
    return base, folder / "dense"


def with_adapter(base, **options):
    return add_adapter(load_base(base, dtype=torch.float32), **{**OPTIONS, **options})


def outputs(model):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits[0] for ids in SEQUENCES])


def seen_inputs(model, names):
    """What the linears are given when the whole model runs."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
        for name in names
    ]
    with torch.no_grad():
        for ids in SEQUENCES:
            model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items() if parts}


def streamed(dense, base, blocks, names):
    with Progress(disable=True) as bar:
        return list(moments(dense, base, blocks, names, SEQUENCES, bar))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().mean().item())


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "cpmant", "jamba", "gemma3"])
def test_inputs_are_those_of_the_whole_model(name):
    """Blocks of two kinds, with rotary angles of their own, that return tuples; Conv1D; a model with vision."""
    model = build(name)
    linears = [n for n, module in model.named_modules() if is_to_be_quantized(n, module)]
    blocks, inside = blocks_of(model, linears)
    expected = seen_inputs(model, inside)
    found = {linear: part for names, part in streamed(model, model, blocks, inside) for linear in names}
    assert found.keys() == expected.keys()
    for linear, x in expected.items():
        close(found[linear].hessian, x.t() @ x / len(x))
        assert found[linear].drift.abs().max() <= 1e-5 * found[linear].hessian.abs().max()
    again = seen_inputs(model, inside)
    assert all(torch.equal(again[linear], x) for linear, x in expected.items())


def test_linears_that_are_given_the_same_come_together(folders):
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    stages = [[name.rpartition(".")[2] for name in stage] for stage, _ in streamed(model, model, "model.layers", names)]
    assert stages == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


def test_a_sequence_that_does_not_come_to_a_linear_is_left_out_of_it(folders, monkeypatch):
    whole = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: whole(mlp, x) if x.shape[-2] > 30 else torch.zeros_like(x))
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    names = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    tokens = {linear: part.tokens for found, part in streamed(model, model, "model.layers", names) for linear in found}
    assert tokens == {name: 40 if "mlp" in name else 65 for name in names}


@pytest.mark.parametrize("training", [False, True])
def test_every_linear_sees_what_those_before_it_have_become(folders, monkeypatch, training):
    found = {}

    def spied(*args):
        for names, part in moments(*args):
            found.update(dict.fromkeys(names, part))
            yield names, part

    monkeypatch.setattr(calibrating, "moments", spied)
    model, dense = (
        with_adapter(folders[0], scales=True, lora_dropout=0.5),
        AutoModelForCausalLM.from_pretrained(folders[1]),
    )
    model.train(training)
    calibrate(model, folders[1], SEQUENCES, progress=False)
    assert all(module.training == training for module in model.modules())
    names = [name for name, _ in dense.named_modules() if name.endswith("_proj")]
    inputs = seen_inputs(model.eval().get_base_model(), names)
    for name, x16 in seen_inputs(dense.float(), names).items():
        x = inputs[name]
        close(found[name].hessian, x.t() @ x / len(x))
        drift = x.t() @ (x16 - x) / len(x)
        rounding = 5e-4 * found[name].hessian.norm()  # blocks run in the files' dtype
        assert (found[name].drift - drift).norm() <= 0.02 * drift.norm() + rounding


@pytest.mark.parametrize("scales", [False, True])
def test_calibrated_saved_merged(folders, tmp_path, scales):
    base, dense = folders
    expected = outputs(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32))
    model = with_adapter(base, scales=scales, rank_pattern={"o_proj": 6})
    still = outputs(model)
    errors = calibrate(model, dense, SEQUENCES, progress=False)
    assert len(errors) == 14
    assert all(after <= before for before, after in errors.values())
    assert sum(after for _, after in errors.values()) < 0.95 * sum(before for before, _ in errors.values())
    found = outputs(model)
    assert (found - expected).square().mean() < (still - expected).square().mean()
    model.save_pretrained(tmp_path / "adapter")
    qalora = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["qalora"]
    assert qalora["init"] == "calibrated"
    loaded = load_adapter(load_base(base, dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(outputs(loaded), found)
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged", "float32", progress=False).folder
    assert torch.allclose(outputs(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)), found, atol=1e-3)


def test_errors_are_those_of_the_outputs(folders):
    """Of a linear in the first block, which has the same inputs in both models."""
    model, dense = with_adapter(folders[0], scales=True), AutoModelForCausalLM.from_pretrained(folders[1])
    errors = calibrate(model, folders[1], SEQUENCES, progress=False)
    name = "model.layers.0.self_attn.v_proj"
    inputs = []
    dense.float().get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    outputs(dense)
    x, layer = torch.cat(inputs), model.get_base_model().get_submodule(name)
    with torch.no_grad():
        off = layer(x) - dense.get_submodule(name)(x)
    assert errors[name].after == pytest.approx(off.square().sum().item() / len(x), rel=1e-3)


def test_of_linears_that_the_active_adapter_is_on(folders, caplog):
    """Another one beside it stays as it is; what an alpha of 0 switches off does, too."""
    model = with_adapter(folders[0])
    bound = model.peft_config["default"].qalora
    options = {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"q_proj": 0}}
    model.add_adapter("second", QALoraConfig(r=4, qalora=bound, **options))
    with model.disable_adapter(), pytest.raises(QALoraError, match=r"Calibrate it outside of disable_adapter\(\)"):
        calibrate(model, folders[1], SEQUENCES, progress=False)
    model.set_adapter("second")
    errors = calibrate(model, folders[1], SEQUENCES, progress=False)
    assert {name.rpartition(".")[2] for name in errors} == {"up_proj"}
    assert "2 linears keep an adapter that starts at zero" in caplog.text
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert parameter.any() == ("second" in name and "up_proj" in name), name
    assert model.peft_config["second"].qalora["init"] == "calibrated"
    assert "init" not in model.peft_config["default"].qalora


def test_text_is_read_as_quantize_reads_it(folders, tmp_path, caplog):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{i} is a number " * 20}) for i in range(9)))
    model = with_adapter(folders[0], target_modules=["q_proj", "lm_head", "down_proj"])
    with caplog.at_level("INFO"):
        errors = calibrate(model, folders[1], tmp_path / "text.jsonl", samples=6, length=100)
    assert len(errors) == 4
    assert "adapter calibrated on 600 tokens: the mean square error of 4 linears' outputs is 0." in caplog.text


def test_what_is_in_no_block_is_left_out(folders):
    twin = AutoModelForCausalLM.from_pretrained(folders[1])
    assert blocks_of(twin, ["lm_head", "model.layers.0.mlp.up_proj"]) == (
        "model.layers",
        ["model.layers.0.mlp.up_proj"],
    )
    with pytest.raises(QALoraError, match="no list of blocks"):
        blocks_of(twin, ["lm_head"])


def test_the_same_again(folders):
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = with_adapter(folders[0], scales=True, r=5)
        calibrate(model, folders[1], SEQUENCES, progress=False)
        states.append({name: p for name, p in model.named_parameters() if "lora_" in name})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_sequences_may_be_tensors(folders):
    assert calibrate(with_adapter(folders[0]), folders[1], (torch.tensor(one) for one in SEQUENCES), progress=False)


@pytest.mark.parametrize("name", ["mllama", "openai-gpt"])
def test_models_that_cannot_go_block_by_block(name):
    """One leaves blocks out that text does not need; another does its own to hidden states in between."""
    model = build(name)
    names = [n for n, module in model.named_modules() if is_to_be_quantized(n, module)]
    with pytest.raises(QALoraError, match="does more between its blocks"):
        streamed(model, model, *blocks_of(model, names))
