"""What is wrapped around a training step: checkpointing, autocast, dropout, adapters, optimizers.

Each is compared with dense weights under plain autograd (``dense_reference.py``) or with the same step without it.
"""

import pytest
import torch
from peft import LoraConfig
from support.dense_reference import dense_reference
from support.fabricate import make_adapter, make_base
from support.steps import COMPILED, EAGER, IDS, assert_same_step, make_quant_linear, step, with_random_b
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from qalora_plugin import add_adapter, load_adapter, load_base
from qalora_plugin.core import reference
from qalora_plugin.core.delta import OffsetDelta
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraConfig, QALoraLayer
from qalora_plugin.kernels import cpu
from qalora_plugin.kernels.autograd import _adapter_gradients
from qalora_plugin.kernels.unpacking import UnpackAndMultiply

REFERENCE = 5e-5  # float32 against a float64 model; its RMSNorms are float32, as transformers writes them


def freeze_base(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def test_step_is_the_reference(model):
    assert_same_step(step(model), step(freeze_base(dense_reference(model, dtype=torch.float64))), REFERENCE)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_step_is_as_exact_as_a_dense_models(model, compiled, monkeypatch):
    """Against float64, all gradients together: no further off than the reference itself is under the same autocast."""
    if compiled:  # in C++, for which this model is too small otherwise
        monkeypatch.setattr(cpu, "SMALLEST", 1)
    exact = step(freeze_base(dense_reference(model, dtype=torch.float64)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, dense = step(model), step(freeze_base(dense_reference(model)))
    assert all(gradient.dtype == torch.float32 for gradient in found[1].values())

    def error(other):
        loss, gradients = other
        squares = [
            ((gradients[name] - expected).square().sum(), expected.square().sum())
            for name, expected in exact[1].items()
        ]
        return abs(loss - exact[0]) / exact[0], (sum(d for d, _ in squares) / sum(e for _, e in squares)).sqrt()

    (loss_error, gradient_error), (dense_loss_error, dense_gradient_error) = error(found), error(dense)
    assert loss_error <= max(2 * dense_loss_error, 1e-3)
    assert gradient_error <= 1.25 * dense_gradient_error


# --- gradient checkpointing


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_step_is_the_same(model, reentrant, autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = step(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found = step(model)
    assert_same_step(found, expected, 0)


# --- several adapters, disabled adapters, dropout


def test_switching_adapters_gives_the_reference_of_each(base, adapter, tmp_path):
    model = load_adapter(load_base(base, dtype=torch.float32), adapter, is_trainable=True).eval()
    model.load_adapter(make_adapter(base, tmp_path / "other", seed=1, r=8, std=0.1), "other")

    def assert_is_reference(names):
        expected = dense_reference(model, names, torch.float64)(IDS).logits
        assert (model(IDS).logits - expected).abs().max() <= REFERENCE * expected.abs().max()

    assert_is_reference(("default",))
    model.set_adapter("other")
    assert_is_reference(("other",))
    with model.disable_adapter():
        assert_is_reference(())
    assert_is_reference(("other",))
    model.base_model.set_adapter(["default", "other"])
    assert_is_reference(("default", "other"))
    model.set_adapter("default")
    assert_is_reference(("default",))


def test_only_the_active_adapter_trains(base, adapter, tmp_path):
    model = load_adapter(load_base(base, dtype=torch.float32), adapter, is_trainable=True).train()
    model.load_adapter(make_adapter(base, tmp_path / "other", seed=1), "other", is_trainable=True)
    model.set_adapter("other")
    _, gradients = step(model)
    assert len(gradients) == 28
    assert all(".other." in name for name in gradients)


def test_a_second_adapter_says_which_base_it_is_for(model):
    with pytest.raises(QALoraError, match=r"'second' has a LoraConfig.*qalora=model.peft_config"):
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    bound = model.peft_config["default"].qalora
    model.add_adapter("third", QALoraConfig(r=2, target_modules=["q_proj"], qalora=bound))
    model.set_adapter("third")
    _, gradients = step(model)
    assert len(gradients) == 4
    assert all("q_proj" in name and ".third." in name for name in gradients)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("names", [("default",), ("default", "other")])
def test_dropout_path_with_a_fixed_mask_is_the_reference(names, act_order):
    """Forward and every gradient of the two-path form; the mask is drawn again from the same seed."""
    p, config = 0.3, QALoraConfig(r=4, lora_alpha=8, lora_dropout=0.3)
    base = make_quant_linear(64, 96, 0, act_order=act_order)
    layer = QALoraLayer(base, "default", config, 4, 8)
    layer.update_layer("other", 2, lora_alpha=1, config=config)
    layer.set_adapter(list(names))
    with_random_b(layer, 0.5).train()
    x = torch.randn(5, 64, requires_grad=True)
    torch.manual_seed(7)
    y = layer(x)
    dy = torch.randn_like(y)
    parameters = [side[name].weight for name in names for side in (layer.lora_A, layer.lora_B)]
    found = torch.autograd.grad(y, (x, *parameters), dy)

    weight = reference.dequantize(base.quantized)
    x64, *doubles = (t.detach().double().requires_grad_() for t in (x, *parameters))
    torch.manual_seed(7)
    y64 = x64 @ weight
    for i, name in enumerate(names):
        kept = F.dropout(torch.ones(5, 64), p).double()
        pooled = reference.pool(x64 * kept, reference.column_groups(base.quantized), base.groups)
        y64 = y64 + layer.scaling[name] * pooled @ doubles[2 * i].t() @ doubles[2 * i + 1].t()
    expected = torch.autograd.grad(y64, (x64, *doubles), dy.double())
    for one, other in zip((y, *found), (y64, *expected), strict=True):
        assert (one - other).abs().max() <= EAGER * other.abs().max()

    layer.eval()
    y64 = x64 @ weight
    for i, name in enumerate(names):
        pooled = reference.pool(x64, reference.column_groups(base.quantized), base.groups)
        y64 = y64 + layer.scaling[name] * pooled @ doubles[2 * i].t() @ doubles[2 * i + 1].t()
    assert (layer(x) - y64).abs().max() <= EAGER * y64.abs().max()


# --- the adapter's gradients


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "rank"), [(1, 1), (4, 1), (5, 1), (64, 16), (65, 16), (256, 8)])
def test_both_ways_to_the_adapters_gradients(groups, rank, dtype, tolerance, adapter_dtype):
    """Up to four groups a rank through dE, above factored; both against float64."""
    if dtype == torch.float64:
        adapter_dtype = torch.float64
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    dy, pooled = draw(96, 80), draw(96, groups)
    lora_a, lora_b = draw(rank, groups, dtype=adapter_dtype), draw(80, rank, dtype=adapter_dtype)
    found = _adapter_gradients(dy, pooled, OffsetDelta(lora_a, lora_b, 0.5), None, UnpackAndMultiply())
    dy, pooled, a, b = (t.double() for t in (dy, pooled, lora_a, lora_b))
    expected = 0.5 * (dy @ b).t() @ pooled, 0.5 * dy.t() @ (pooled @ a.t())
    if torch.bfloat16 in (dtype, adapter_dtype):
        tolerance = 1e-2
    for one, other, like in zip(found, expected, (lora_a, lora_b), strict=True):
        assert one.dtype == like.dtype
        assert one.shape == like.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()


# --- optimizers


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """Wide enough for bitsandbytes to keep its states in 8 bits, which it does from 4096 elements on."""
    return make_base(tmp_path_factory.mktemp("wide") / "model", hidden=128)


ROWS = [{"input_ids": list(range(4 + i, 40 + i)), "labels": list(range(4 + i, 40 + i))} for i in range(16)]


@pytest.mark.parametrize(
    "name",
    [
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "lion_32bit",
        "lion_8bit",
        "rmsprop",
        "sgd",
        pytest.param("paged_adamw_8bit", marks=pytest.mark.gpu),
        pytest.param("paged_adamw_32bit", marks=pytest.mark.gpu),
        pytest.param("paged_lion_8bit", marks=pytest.mark.gpu),
    ],
)
def test_optimizer_trains(wide_base, tmp_path, name):
    torch.manual_seed(0)
    model = add_adapter(load_base(wide_base, dtype=torch.float32), r=32, lora_alpha=32, target_modules="all-linear")
    rate = {"sgd": 1.0, "rmsprop": 1e-3, "lion_32bit": 1e-3, "lion_8bit": 1e-3}.get(name, 5e-3)
    arguments = TrainingArguments(
        str(tmp_path), optim=name, max_steps=8, per_device_train_batch_size=4, learning_rate=rate, report_to=[],
        use_cpu=not torch.cuda.is_available(), logging_steps=1, save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    run = Trainer(model, arguments, train_dataset=ROWS)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert losses[-1] < 0.9 * losses[0], losses
    if "8bit" in name:
        states = run.optimizer.state.values()
        assert any(t.dtype == torch.uint8 for state in states for t in state.values() if isinstance(t, torch.Tensor))


def test_step_through_the_compiled_kernel(monkeypatch, model):
    """The tests above run on plain torch, too small for the compiled kernel; this step takes it, and is the same."""
    expected, calls, fill = step(model), [], cpu.fill
    monkeypatch.setattr(cpu, "SMALLEST", 1)
    monkeypatch.setattr(cpu, "fill", lambda *arguments: calls.append(1) or fill(*arguments))
    found = step(model)
    assert len(calls) == 14 + 14 - 3  # forward and backward; nothing behind the first q, k and v wants dx
    assert_same_step(found, expected, COMPILED)
