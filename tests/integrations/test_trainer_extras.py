"""What PEFT, transformers and TRL let happen around an adapter: it is refused before training, or nothing is lost."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from qalora_plugin import QALoraMergeCallback, add_adapter, load_base
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.adapter import QALoraConfig, QALoraLayer
from qalora_plugin.integrations.transformers.averaged_weights import AveragedWeights

ROWS = [{"input_ids": list(range(4 + i, 40 + i)), "labels": list(range(4 + i, 40 + i))} for i in range(8)]


def adapted(base, **options):
    torch.manual_seed(0)
    return add_adapter(load_base(base, dtype=torch.float32), **{"r": 4, "target_modules": "all-linear", **options})


def trainer(model, out, base, callback=None, **options):
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(str(out), **(settings | options))
    return Trainer(model, arguments, train_dataset=ROWS, callbacks=[callback or QALoraMergeCallback(base)])


def factors(model, name="default"):
    return {key: part.detach().clone() for key, part in model.named_parameters() if f".{name}." in key}


@pytest.mark.parametrize("scales", [False, True])
def test_a_run_with_a_second_adapter_resumes_the_one_it_trains(base, tmp_path, scales):
    """TRL adds a frozen one, ref, to compare with; transformers then loads that alone."""

    def run(out):
        model = adapted(base, scales=scales)
        model.add_adapter("ref", model.peft_config["default"])
        return trainer(model, out, base)

    (straight := run(tmp_path / "a")).train()
    assert (tmp_path / "a" / "checkpoint-2" / "ref").is_dir()
    (resumed := run(tmp_path / "b")).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name in ("default", "ref"):
        expected, found = factors(straight.model, name), factors(resumed.model, name)
        assert all(torch.equal(found[key], part) for key, part in expected.items())
    assert any(part.any() for key, part in factors(resumed.model).items() if "lora_B" in key)
    assert [name for name, part in resumed.model.named_parameters() if part.requires_grad and ".ref." in name] == []


def test_what_trains_beside_the_adapter_is_refused(base, tmp_path):
    model = adapted(base)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(QALoraError, match=r"1 parameters train beside the adapter \(.*model\.norm\.weight"):
        trainer(model, tmp_path, base).train()


def test_embeddings_that_were_resized_afterwards_are_refused(base, tmp_path):
    model = adapted(base)
    model.resize_token_embeddings(140)
    with pytest.raises(QALoraError, match="the embeddings were resized from 128 to 140 tokens"):
        trainer(model, tmp_path, base).train()


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_tasks_with_a_head_of_their_own_are_refused(base, task):
    options = {"r": 4, "target_modules": "all-linear", "task_type": task}
    with pytest.raises(QALoraError, match=f"task_type '{task}' trains a head of its own"):
        add_adapter(load_base(base, dtype=torch.float32), **options)
    with pytest.raises(QALoraError, match=f"task_type '{task}' trains a head of its own"):
        get_peft_model(load_base(base, dtype=torch.float32), LoraConfig(**options))


def test_a_second_adapter_has_the_targets_that_it_asks_for(base):
    model = adapted(base)
    bound = model.peft_config["default"].qalora
    model.add_adapter("b", QALoraConfig(r=4, target_modules="all-linear", qalora=bound))
    layers = [module for module in model.modules() if isinstance(module, QALoraLayer)]
    assert all({"default", "b"} <= set(layer.lora_A) for layer in layers)
    assert model.peft_config["b"].linears == len(layers) == 14
    model.add_adapter("c", QALoraConfig(r=4, target_modules=["lm_head", "q_proj"], qalora=bound))
    assert sum("c" in layer.lora_A for layer in layers) == 2
    assert not hasattr(model.get_base_model().lm_head, "lora_A")
    with pytest.raises(QALoraError, match="match no quantised linear"):
        model.add_adapter("d", QALoraConfig(r=4, target_modules=["nonesuch"], qalora=bound))


class Averaging(torch.optim.SGD):
    """Trains other weights than it evaluates, as schedule-free optimizers do."""

    def eval(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(0.125)


def test_what_is_saved_is_what_a_schedule_free_optimizer_evaluates(base, tmp_path):
    model = adapted(base)
    run = trainer(model, tmp_path, base)
    run.optimizer = Averaging([part for part in model.parameters() if part.requires_grad], lr=1e-3)
    run.train()
    saved = PeftModel.from_pretrained(load_base(base, dtype=torch.float32), tmp_path)
    assert all((part == 0.125).all() for part in factors(saved).values())


@pytest.mark.parametrize("best", [None, "checkpoint-1"])
def test_the_best_checkpoints_weights_are_averaged_already(best):
    """Where a callback stops training, nothing is evaluated between the loading of these and the end."""
    part = torch.nn.Parameter(torch.zeros(2))
    arguments = SimpleNamespace(load_best_model_at_end=True)
    state = SimpleNamespace(best_model_checkpoint=best)
    AveragedWeights().on_train_end(arguments, state, None, optimizer=Averaging([part], lr=1e-3))
    assert (part == (0.125 if best is None else 0)).all()


def test_vllm_inside_training(base):
    """TRL starts vLLM, and only then asks for weights that there are not."""
    with pytest.raises(QALoraError, match=r"use_vllm=True cannot be .* Leave use_vllm out"):
        QALoraMergeCallback(base).on_init_end(SimpleNamespace(use_vllm=True, fsdp=[]), None, None, model=None)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def test_streams_are_proved_on(base, tmp_path):
    run = trainer(adapted(base), tmp_path, base, QALoraMergeCallback(base, verify=True, verify_tokens=64))
    run.eval_dataset = Stream()
    run.add_callback(Evaluated(run))
    run.train()
    assert "logits" in (tmp_path / "merged" / "README.md").read_text()


class Evaluated(QALoraMergeCallback.__base__):
    """Has the Trainer make its loader of evaluation data."""

    def __init__(self, run):
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs):
        self.run.callback_handler.eval_dataloader = self.run.get_eval_dataloader()


@pytest.mark.parametrize("kind", [PromptTuningConfig, LNTuningConfig])
def test_adapters_of_other_kinds_are_pefts_own_matter(merged, tmp_path, kind):
    options = {"num_virtual_tokens": 4} if kind is PromptTuningConfig else {"target_modules": ["norm"]}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), kind(task_type="CAUSAL_LM", **options)
    )
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), tmp_path)
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"use_rslora": "false"},
        {"rank_pattern": ["q_proj"]},
        {"target_modules": [1]},
        {"exclude_modules": 3},
        {"layers_to_transform": "x"},
    ],
    ids=str,
)
def test_values_of_another_kind_are_refused_at_once(base, wrong):
    (name,) = wrong
    with pytest.raises(QALoraError, match=f"the adapter's config: {name} is .*, expected"):
        adapted(base, **wrong)


def test_no_dropout_is_none(base):
    assert adapted(base, lora_dropout=None).peft_config["default"].lora_dropout == 0


def test_transformers_own_loader_takes_no_part_of_an_adapter(base, adapter, tmp_path):
    half = shutil.copytree(adapter, tmp_path / "half")
    tensors = load_file(half / "adapter_model.safetensors")
    del tensors[next(key for key in tensors if "lora_A" in key)]
    save_file(tensors, half / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QALoraError, match="lacks A or B of"):
        load_base(base, dtype=torch.float32).load_adapter(half)
    load_base(base, dtype=torch.float32).load_adapter(adapter)
