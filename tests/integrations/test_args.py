"""The YAML keys: what is accepted, what is refused, and what the refusal says."""

import pytest
from pydantic import ValidationError

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.axolotl.args import QALoraArgs, read_block, refuse_unmergeable

GOOD = {"adapter": "qalora", "base_model": "x", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}


def test_defaults():
    block = QALoraArgs.model_validate(dict(GOOD)).qalora
    assert block.merge
    assert block.verify
    assert block.offset_dtype is None  # the merge chooses
    assert block.merge_dir is None


def test_every_key_is_described():
    from qalora_plugin.integrations.axolotl.args import QALoraBlock

    assert all(field.description for field in QALoraBlock.model_fields.values())


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValidationError, match=r"unknown key 'ofset_dtype' in qalora:. Did you mean 'offset_dtype'"):
        QALoraArgs.model_validate(GOOD | {"qalora": {"ofset_dtype": "float32"}})


def test_wrong_value():
    with pytest.raises(ValidationError, match="'float16' or 'float32'"):
        QALoraArgs.model_validate(GOOD | {"qalora": {"offset_dtype": "int8"}})


def test_block_without_the_adapter():
    with pytest.raises(ValidationError, match="there is a qalora: block, but adapter is 'lora'"):
        QALoraArgs.model_validate(GOOD | {"adapter": "lora", "qalora": {"merge": True}})


def test_other_adapters_are_left_alone():
    assert QALoraArgs.model_validate({"adapter": "lora", "lora_mlp_kernel": True}).qalora is None


@pytest.mark.parametrize(
    "key",
    [
        "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel", "peft_use_dora", "load_in_4bit",
        "load_in_8bit", "lora_modules_to_save", "lora_target_parameters", "peft_layer_replication",
        "peft_trainable_token_indices", "unfrozen_parameters", "qat", "fsdp", "lora_fan_in_fan_out",
        "fix_untrained_tokens", "reward_model", "process_reward_model", "llmcompressor", "quantize_moe_experts",
        "nonexpert_quantization", "dsv4_fp8_lora_kernel", "model_quantization_config",
    ],
)  # fmt: skip
def test_refused_keys(key):
    with pytest.raises(QALoraError, match=f"{key} cannot be combined with adapter: qalora: .* Remove {key}"):
        refuse_unmergeable(GOOD | {key: True})
    refuse_unmergeable(GOOD | {key: False})


@pytest.mark.parametrize("tokens", [1, 0, -5])
def test_too_few_tokens_to_verify_on(tokens):
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        QALoraArgs.model_validate(GOOD | {"qalora": {"verify_tokens": tokens}})


@pytest.mark.parametrize("key", ["fp8", "fp8_enable_fsdp_float8_all_gather"])
def test_factors_in_8_bits(key):
    with pytest.raises(QALoraError, match=f"{key} cannot be .* factors in 8 bits.* Set bf16: true"):
        refuse_unmergeable(GOOD | {key: True})


@pytest.mark.parametrize("key", ["flash_attn_fuse_mlp", "use_onebitllms"])
def test_what_rewrites_dense_linears(key):
    """Axolotl itself refuses them of its own adapters alone."""
    with pytest.raises(QALoraError, match=f"{key} cannot be .* rewrites linears by their dense weights"):
        refuse_unmergeable(GOOD | {key: True})


def test_loftq_and_pissa():
    with pytest.raises(QALoraError, match="LoftQ rewrites the base weight"):
        refuse_unmergeable(GOOD | {"peft": {"loftq_config": {"loftq_bits": 4}}})
    with pytest.raises(QALoraError, match="peft_init_lora_weights: pissa"):
        refuse_unmergeable(GOOD | {"peft_init_lora_weights": "pissa"})


@pytest.mark.parametrize("key", ["lora_r", "lora_alpha"])
def test_missing_keys(key):
    with pytest.raises(QALoraError, match=f"needs {key}"):
        refuse_unmergeable({name: value for name, value in GOOD.items() if name != key})


def test_no_targets():
    with pytest.raises(QALoraError, match="lora_target_linear: true or a list"):
        refuse_unmergeable(GOOD | {"lora_target_linear": False})


def test_vllm_inside_training():
    with pytest.raises(QALoraError, match=r"Set trl\.use_vllm: false"):
        refuse_unmergeable(GOOD | {"rl": "grpo", "trl": {"use_vllm": True}})
    refuse_unmergeable(GOOD | {"rl": "grpo", "trl": {"use_vllm": False}})


def test_preference_training_from_an_adapter():
    config = GOOD | {"lora_model_dir": "./sft"}
    with pytest.raises(QALoraError, match=r"rl: dpo with lora_model_dir: .* ignores the given one"):
        refuse_unmergeable(config | {"rl": "dpo"})
    refuse_unmergeable(config | {"rl": "orpo"})
    refuse_unmergeable(config | {"rl": "dpo", "merge_lora": True})


@pytest.mark.parametrize(
    "key", ["tensor_parallel_size", "expert_parallel_size", "context_parallel_size", "sequence_parallel_degree"]
)
def test_splitting_linears_experts_or_sequences_is_refused(key):
    with pytest.raises(QALoraError, match=f"{key}: 2 cannot be combined with adapter: qalora"):
        refuse_unmergeable(GOOD | {key: 2})
    refuse_unmergeable(GOOD | {key: 1})


INIT = {"init": "calibrated", "init_model": "./dense", "init_dataset": "./text.jsonl"}


def test_a_calibrated_start_needs_its_inputs():
    read_block(INIT)
    assert read_block({}).init is None
    for missing in ("init_model", "init_dataset"):
        with pytest.raises(QALoraError, match=f"qalora.init is calibrated, but {missing} is missing: .*Set both"):
            read_block({key: value for key, value in INIT.items() if key != missing})
    with pytest.raises(QALoraError, match="init_model and init_dataset is missing"):
        read_block({"init": "calibrated"})
    with pytest.raises(QALoraError, match=r"qalora\.init_samples is set, but init is not"):
        read_block({"init_samples": 4})
    with pytest.raises(QALoraError, match=r"qalora\.init is 'loftq': .*'calibrated'"):
        read_block(INIT | {"init": "loftq"})
    with pytest.raises(QALoraError, match=r"qalora\.init_samples is 0"):
        read_block(INIT | {"init_samples": 0})


@pytest.mark.parametrize(
    "block",
    [
        {"scales": True, "scales_lr_ratio": True},
        INIT | {"init_samples": True},
        {"verify_tokens": True},
    ],
)
def test_a_number_is_no_boolean(block):
    key = list(block)[-1]
    with pytest.raises(QALoraError, match=rf"qalora\.{key} is True: .*Correct it"):
        read_block(block)
    assert read_block({"scales": True, "scales_lr_ratio": "1e-1"}).scales_lr_ratio == 0.1  # text, as PyYAML reads 1e-1


@pytest.mark.parametrize("value", [True, float("inf"), float("nan"), 0])
@pytest.mark.parametrize("key", ["lora_r", "lora_alpha"])
def test_rank_and_alpha_are_finite_numbers_above_zero(key, value):
    with pytest.raises(QALoraError, match=f"{key} is {value}, expected .* above 0"):
        refuse_unmergeable(GOOD | {key: value})
