"""TRL's own way: a plain ``LoraConfig`` for a base from ``load_base``, in each of its trainers. And PEFT's."""

import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from support.fabricate import make_tokenizer

from qalora_plugin import QALoraConfig, QALoraMergeCallback, add_adapter, load_base
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.verifying import verify
from qalora_plugin.integrations.peft.adapter import QALoraLayer

IDS = list(range(4, 100))
PAIRS = {"prompt": ["say "] * 8, "chosen": ["yes yes"] * 8, "rejected": ["no no no"] * 8}
JUDGED = {"prompt": ["say "] * 8, "completion": ["yes yes", "no no"] * 4, "label": [True, False] * 4}


def settings(out, **options):
    shared = {"max_steps": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "logging_steps": 1}
    return {"output_dir": str(out), "per_device_train_batch_size": 2, **shared, **options}


def length(completions, **_):
    return [float(len(completion)) for completion in completions]


def sft(model, out, **shared):
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_dict({"text": ["the same few words"] * 8})
    return SFTTrainer(model, SFTConfig(**settings(out)), train_dataset=rows, **shared)


def dpo(model, out, **shared):
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(model, args=DPOConfig(**settings(out)), train_dataset=Dataset.from_dict(PAIRS), **shared)


def kto(model, out, **shared):
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer(model, args=KTOConfig(**settings(out)), train_dataset=Dataset.from_dict(JUDGED), **shared)


def grpo(model, out, **shared):
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(**settings(out, num_generations=2, max_completion_length=8))
    rows = Dataset.from_dict({"prompt": ["say "] * 8})
    return GRPOTrainer(model, reward_funcs=length, args=arguments, train_dataset=rows, **shared)


@pytest.mark.parametrize(
    ("trainer", "targets", "adapted"),
    [
        (sft, "all-linear", 14),
        (sft, ["q_proj", "down_proj"], 4),
        (sft, None, 4),  # PEFT's default for this model: q_proj and v_proj
        (sft, r".*layers\.0\..*proj", 7),
        (dpo, "all-linear", 14),
        (kto, ["up_proj"], 2),
        (grpo, "all-linear", 14),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_trains_merges_and_verifies(base, tmp_path, trainer, targets, adapted):
    torch.manual_seed(0)
    run = trainer(
        load_base(base, dtype=torch.float32),
        tmp_path,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"),
        processing_class=make_tokenizer(),
        callbacks=[QALoraMergeCallback(base)],
    )
    layers = [module for module in run.model.modules() if isinstance(module, QALoraLayer)]
    assert len(layers) == adapted
    run.train()
    assert any(layer.lora_B["default"].weight.any() for layer in layers)
    report = verify(base, tmp_path, tmp_path / "merged", [IDS], device="cpu", progress=False)
    assert report.passed
    assert report.modules == adapted


def test_dpo_from_an_adapter_that_is_there(base, tmp_path):
    """TRL then adds a second, frozen one as the reference."""
    model = add_adapter(load_base(base, dtype=torch.float32), r=4, target_modules="all-linear")
    run = dpo(model, tmp_path, processing_class=make_tokenizer(), callbacks=[QALoraMergeCallback(base)])
    run.train()
    assert set(run.model.peft_config) == {"default", "ref"}
    assert verify(base, tmp_path, tmp_path / "merged", [IDS], device="cpu", progress=False).passed


def test_get_peft_model_is_add_adapter(base, tmp_path):
    torch.manual_seed(0)
    ours = add_adapter(load_base(base, dtype=torch.float32), r=4, target_modules="all-linear")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(load_base(base, dtype=torch.float32), lora)
    assert type(theirs.peft_config["default"]) is QALoraConfig
    assert lora.target_modules == "all-linear"  # the caller's config stays as it was
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    ignored = set(theirs._ddp_params_and_buffers_to_ignore)
    assert ignored == {name for name, _ in theirs.named_buffers() if ".base_layer." in name}


def test_models_of_others_get_pefts_own_lora():
    from peft.tuners.lora import Linear
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=128))
    model = get_peft_model(dense, LoraConfig(target_modules=["q_proj"]))
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) is Linear
    assert type(model.peft_config["default"]) is LoraConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["lm_head"]}, "match no quantised linear"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora cannot be combined with QA-LoRA"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save cannot be combined"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_merged_is_refused_on_this_way_too(base, options, message):
    with pytest.raises(QALoraError, match=message):
        get_peft_model(load_base(base, dtype=torch.float32), LoraConfig(**options))


def test_merged_checkpoints_take_an_adapter(merged):
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(merged), LoraConfig(target_modules=["q_proj"]))
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, QALoraLayer)


def test_saved_adapter_is_loaded_by_peft(base, adapter):
    model = PeftModel.from_pretrained(load_base(base, dtype=torch.float32), adapter)
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj, QALoraLayer)


SCRIPT = """
import sys
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from qalora_plugin import QALoraMergeCallback, load_base

base, out = sys.argv[1:]
SFTTrainer(
    load_base(base),
    SFTConfig(out, max_steps=1, report_to=[], use_cpu=True),
    train_dataset=Dataset.from_dict({"text": ["the same few words"] * 8}),
    processing_class=AutoTokenizer.from_pretrained(base),
    peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[QALoraMergeCallback(base)],
).train()
"""


def test_a_script_that_imports_us_last(base, tmp_path):
    subprocess.run([sys.executable, "-c", SCRIPT, base, tmp_path / "out"], check=True)
    assert (tmp_path / "out" / "merged" / "offsets.safetensors").is_file()
