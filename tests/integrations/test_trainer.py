"""HF Trainer and TRL without Axolotl: the README's example, the callback, a real training run that merges."""

import re
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.fabricate import make_base, make_tokenizer
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, Trainer, TrainingArguments

from qalora_plugin import QALoraMergeCallback, add_adapter, load_base
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.verifying import verify

ROWS = [{"input_ids": list(range(4 + i, 40 + i)), "labels": list(range(4 + i, 40 + i))} for i in range(16)]


def trainer(base, out, merged_base=None, processing_class=None, callback=None, **options):
    torch.manual_seed(0)
    model = add_adapter(load_base(base, dtype=torch.float32), r=4, lora_alpha=8, target_modules="all-linear")
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(out), **(settings | options))
    callback = callback or QALoraMergeCallback(merged_base or base)
    return Trainer(model, arguments, train_dataset=ROWS, processing_class=processing_class, callbacks=[callback])


def test_trains_and_merges(base, tmp_path):
    run = trainer(base, tmp_path / "out", logging_steps=1, max_steps=8)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    report = verify(
        base, tmp_path / "out", tmp_path / "out" / "merged", [ROWS[0]["input_ids"]], device="cpu", progress=False
    )
    assert report.passed


def test_trl_sft(base, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "~"})
    tokenizer.chat_template = "NEW"
    model = add_adapter(load_base(base, dtype=torch.float32), r=4, lora_alpha=8, target_modules="all-linear")
    arguments = SFTConfig(str(tmp_path), max_steps=4, learning_rate=1e-2, report_to=[], use_cpu=True, logging_steps=1)
    run = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_dict({"text": ["the same few words"] * 32}),
        processing_class=tokenizer, callbacks=[QALoraMergeCallback(base, tmp_path / "out")],
    )  # fmt: skip
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert verify(base, tmp_path, tmp_path / "out", [ROWS[0]["input_ids"]], device="cpu", progress=False).passed
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (merged.eos_token, merged.chat_template) == ("~", "NEW")
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eos_token_id


def test_any_processing_class_is_saved_before_the_merge(base, tmp_path):
    """Image processors and the like have no tokenizer, but a ``save_pretrained``."""
    image_processor = CLIPImageProcessor(size={"shortest_edge": 7})
    trainer(base, tmp_path, processing_class=image_processor, max_steps=1).train()
    assert CLIPImageProcessor.from_pretrained(tmp_path / "merged").size == image_processor.size


def test_resume_is_bit_identical(base, tmp_path):
    straight = trainer(base, tmp_path / "a", save_steps=2)
    straight.train()
    resumed = trainer(base, tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_resuming_on_a_changed_base_is_refused(base, tmp_path):
    """PEFT reads only the weights of a checkpoint that is resumed, not the config that names its base."""
    folder = shutil.copytree(base, tmp_path / "base")
    trainer(folder, tmp_path / "a", save_steps=2).train()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.qweight"][3, 3] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    resumed = trainer(folder, tmp_path / "b")
    with pytest.raises(QALoraError, match="checkpoint-2 was trained on another base"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.state.global_step == 0
    bare = Trainer(resumed.model, TrainingArguments(str(tmp_path / "c"), max_steps=4, use_cpu=True), train_dataset=ROWS)
    with pytest.raises(QALoraError, match="checkpoint-2 was trained on another base"):
        bare.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_occupied_merge_folder_is_refused_before_training(base, tmp_path):
    (tmp_path / "out" / "merged").mkdir(parents=True)
    run = trainer(base, tmp_path / "out")
    with pytest.raises(QALoraError, match="merged exists"):
        run.train()
    assert run.state.global_step == 0


def test_places_are_checked_before_training(base, tmp_path):
    own = shutil.copytree(base, tmp_path / "base")
    for out, merged, match in (
        (own / "out", None, "output_dir is .*, which is the base's folder, or inside it"),
        (tmp_path / "out", own / "merged", "the merge's folder is .*inside it"),
        (tmp_path / "out", "/proc/merged", "/proc is not writable"),
        (tmp_path / "out", tmp_path / "out", "puts the run's own files"),
        (tmp_path / "both" / "out", tmp_path / "both", "puts the run's own files"),
    ):
        run = trainer(own, out, callback=QALoraMergeCallback(own, merged))
        with pytest.raises(QALoraError, match=match):
            run.train()
        assert run.state.global_step == 0


def test_verifies_on_request_and_says_what_it_trains_on(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    callback = QALoraMergeCallback(base, "~/merged", verify=True, verify_tokens=100)
    trainer(base, tmp_path / "out", callback=callback, processing_class=make_tokenizer()).train()
    output = capsys.readouterr().out
    assert "qalora: 14 packed linears in torch.float32: plain torch unpacks" in output
    assert "layers below 262144 weights are not worth the wait" in output
    assert "qalora verify: PASSED" in output
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| exactness | verified: 63 of 63 base tensors byte-identical; offsets within 1 of their rounding" in card
    assert "over 100 tokens in float32" in card


def test_base_that_the_model_was_not_loaded_from_is_refused_before_training(base, merged, tmp_path):
    for wrong, match in (
        (make_base(tmp_path / "other", seed=9), "loaded from another base.*other is blake3.*that load_base was given"),
        (merged, "loaded from another base"),  # of that base, but not it
        (tmp_path / "nowhere", "nowhere does not exist"),
    ):
        run = trainer(base, tmp_path / "out", merged_base=wrong)
        with pytest.raises(QALoraError, match=match):
            run.train()
        assert run.state.global_step == 0


def test_model_without_our_adapter_is_refused(base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=128))
    model = get_peft_model(dense, LoraConfig(target_modules=["q_proj"]))
    run = Trainer(
        model, TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True), train_dataset=ROWS,
        callbacks=[QALoraMergeCallback(base)],
    )  # fmt: skip
    with pytest.raises(QALoraError, match="has no QA-LoRA adapter"):
        run.train()


def test_readme_example(base, tmp_path):
    """The README's Python example runs as printed, with only its paths replaced, and stays under 40 lines."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(# train\.py.*?)```", readme, re.S)
    assert code.count("\n") < 40
    code = code.replace("./my-gptq-base", str(base)).replace("./outputs", str(tmp_path / "outputs"))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert (tmp_path / "outputs" / "merged" / "offsets.safetensors").is_file()


def test_bad_options_of_the_callback_are_refused_at_once(base):
    with pytest.raises(QALoraError, match="offset_dtype is 'int8', expected one of float16, float32"):
        QALoraMergeCallback(base, offset_dtype="int8")
    with pytest.raises(TypeError, match="ofset_dtype"):
        QALoraMergeCallback(base, ofset_dtype="float32")


@pytest.mark.parametrize("active", ["b", ["default", "b"]])
def test_an_adapter_that_is_not_the_merged_one_is_not_trained(base, tmp_path, active):
    run = trainer(base, tmp_path)
    run.model.add_adapter("b", deepcopy(run.model.peft_config["default"]))
    run.model.base_model.set_adapter(active)
    with pytest.raises(QALoraError, match=r"the active adapter is .*'b', but what is merged is 'default'"):
        run.train()


def test_an_adapter_of_another_name_is_not_the_one_that_is_merged(base, tmp_path):
    model = get_peft_model(load_base(base), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    run = Trainer(model, arguments, train_dataset=ROWS, callbacks=[QALoraMergeCallback(base)])
    with pytest.raises(QALoraError, match="has no adapter named default, which is what is merged, but 'mine'"):
        run.train()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"verify_tokens": 1}, "verify_tokens is 1, expected a whole number of at least 2"),
        ({"verify_tokens": True}, "verify_tokens is True"),
        ({"offsets": "Dense"}, "offsets is 'Dense', expected one of auto, factored, dense"),
    ],
)
def test_options_that_are_used_after_training_are_checked_before_it(base, options, match):
    with pytest.raises(QALoraError, match=match):
        QALoraMergeCallback(base, verify=True, **options)


def test_layers_whose_activations_are_checkpointed_by_fsdp_are_found(base, tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    run = trainer(base, tmp_path)
    layers = run.model.get_base_model().model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    run.callback_handler.on_train_begin(run.args, run.state, run.control)


def test_a_form_of_offsets_that_cannot_be_had_is_refused_before_training(base, tmp_path):
    model = add_adapter(load_base(base), r=2, target_modules=["q_proj"], scales=True)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    run = Trainer(model, arguments, train_dataset=ROWS, callbacks=[QALoraMergeCallback(base, offsets="factored")])
    with pytest.raises(QALoraError, match="are in units of the scales that were trained beside them: no two factors"):
        run.train()


@pytest.mark.parametrize("name", ["tp_size", "cp_size", "sp_size"])
def test_splitting_linears_or_sequences_is_refused_when_the_trainer_is_made(name, base, monkeypatch):
    """Given to the Trainer, or by ``accelerate launch --use-parallelism-config``."""
    from types import SimpleNamespace

    from accelerate.parallelism_config import ParallelismConfig

    from qalora_plugin.integrations import trainer

    model = add_adapter(load_base(base), r=2, target_modules=["q_proj"])
    arguments = SimpleNamespace(fsdp=False, parallelism_config=ParallelismConfig(**{name: 2}))
    message = f"ParallelismConfig: {name}=2 cannot be combined with QA-LoRA: .* Set it to 1"
    with pytest.raises(QALoraError, match=message):
        QALoraMergeCallback(base).on_init_end(arguments, None, None, model=model)
    arguments.parallelism_config = ParallelismConfig(dp_shard_size=2)
    QALoraMergeCallback(base).on_init_end(arguments, None, None, model=model)
    arguments.parallelism_config = None
    monkeypatch.setattr(trainer, "is_launched_with", lambda name: name == "ACCELERATE_USE_PARALLELISM_CONFIG")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")
    with pytest.raises(QALoraError, match=message):
        QALoraMergeCallback(base).on_init_end(arguments, None, None, model=model)


def test_what_fsdp_cannot_do_is_refused_when_the_trainer_is_made(base, monkeypatch):
    """The Trainer itself makes an FSDP engine on GPUs alone."""
    from types import SimpleNamespace

    from qalora_plugin.integrations.peft import sharded
    from qalora_plugin.integrations.transformers import launched

    model = add_adapter(load_base(base), r=2, target_modules=["q_proj"])
    arguments = SimpleNamespace(fsdp=True, fsdp_config={"version": 1}, bf16=False, fp16=False, optim="lion_32bit")
    arguments.parallelism_config = None
    with pytest.raises(QALoraError, match=r"FSDP1 flattens .* Use FSDP2"):
        QALoraMergeCallback(base).on_init_end(arguments, None, None, model=model)
    arguments.fsdp_config = {"version": 2}
    with pytest.raises(QALoraError, match="optim: lion_32bit cannot be combined with FSDP2"):
        QALoraMergeCallback(base).on_init_end(arguments, None, None, model=model)
    arguments.optim = "adamw_torch"
    QALoraMergeCallback(base).on_init_end(arguments, None, None, model=model)
    for module in (launched, sharded):
        monkeypatch.setattr(module, "is_launched_with", lambda name: name == "ACCELERATE_USE_FSDP")
    monkeypatch.setenv("FSDP_VERSION", "1")  # what `accelerate launch --use_fsdp` sets
    with pytest.raises(QALoraError, match="FSDP1 flattens"):
        add_adapter(load_base(base), r=2, target_modules=["q_proj"])
