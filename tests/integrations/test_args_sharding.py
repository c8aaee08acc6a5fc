"""``fsdp_config`` and ``deepspeed``: what is refused before any long work."""

import json

import pytest

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.unsupported import refuse_deepspeed
from qalora_plugin.integrations.axolotl.args import refuse_unmergeable
from qalora_plugin.integrations.axolotl.sharding import check_deepspeed, loaded_for

GOOD = {"base_model": "./base", "adapter": "qalora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
LAYERS = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}


@pytest.mark.parametrize(
    "keys",
    [
        {"fsdp_config": LAYERS},
        {"fsdp_version": 1, "fsdp_config": LAYERS},
        {"fsdp_config": LAYERS | {"version": 1}},
        {"fsdp_config": LAYERS | {"fsdp_version": 1}},
    ],
)
def test_fsdp1_is_refused(keys):
    with pytest.raises(QALoraError, match=r"fsdp_config is for FSDP1 .* Set fsdp_version: 2"):
        refuse_unmergeable(GOOD | keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"fsdp_version": 2, "fsdp_config": LAYERS},
        {"fsdp_config": LAYERS | {"fsdp_version": 2}},
        {"fsdp_version": 2, "fsdp_config": LAYERS | {"mixed_precision_policy": "bf16"}, "bf16": True},
        {"deepspeed": "zero3.json"},
    ],
)
def test_sharding_is_accepted(keys):
    refuse_unmergeable(GOOD | keys)


def test_mixed_precision_that_casts_packed_weights_is_refused():
    keys = {"fsdp_version": 2, "fsdp_config": LAYERS | {"mixed_precision_policy": "fp16"}, "bf16": True}
    with pytest.raises(QALoraError, match=r"mixed_precision_policy is fp16, .* loaded for bf16.* set it to bf16"):
        refuse_unmergeable(GOOD | keys)


@pytest.mark.parametrize(
    ("policy", "keys", "dtype"),
    [
        ("bf16", {"bf16": False}, "fp32"),
        ("fp32", {"bf16": True}, "bf16"),
        ("fp16", {"bfloat16": True}, "bf16"),
        ("bf16", {"bf16": False, "fp16": True}, "fp16"),
        ({"param_dtype": "float16"}, {"bf16": True}, "bf16"),
    ],
)
def test_a_policy_is_held_against_every_key_that_names_a_dtype(policy, keys, dtype):
    fsdp = {"fsdp_version": 2, "fsdp_config": LAYERS | {"mixed_precision_policy": policy}}
    with pytest.raises(QALoraError, match=f"but the base is loaded for {dtype}: FSDP would cast"):
        refuse_unmergeable(GOOD | fsdp | keys)


@pytest.mark.parametrize("keys", [{"fsdp_version": 2}, {"fsdp_version": 2, "fsdp_config": {}}])
def test_a_version_that_shares_nothing_out_is_refused(keys):
    with pytest.raises(
        QALoraError, match=r"fsdp_version is 2, but there is no fsdp_config.* would hold the whole base"
    ):
        refuse_unmergeable(GOOD | keys)


def test_two_engines_at_once_are_refused():
    keys = {"fsdp_version": 2, "fsdp_config": LAYERS, "deepspeed": "zero3.json"}
    with pytest.raises(QALoraError, match=r"both fsdp_config and deepspeed \('zero3.json'\) are set"):
        refuse_unmergeable(GOOD | keys)
    with pytest.raises(QALoraError, match="fsdp_config is 'full_shard', expected a block of keys"):
        refuse_unmergeable(GOOD | {"fsdp_version": 2, "fsdp_config": "full_shard"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 100}}, "Set TRANSFORMER_BASED_WRAP"),
        ({"fsdp_config": LAYERS, "optimizer": "adafactor"}, "optimizer: adafactor cannot be combined with FSDP2"),
        ({"fsdp_config": LAYERS, "optimizer": "paged_adamw_32bit"}, "optimizer: paged_adamw_32bit cannot be combined"),
    ],
    ids=str,
)
def test_what_fsdp2_would_stop_at_later_is_refused(keys, message):
    with pytest.raises(QALoraError, match=message):
        refuse_unmergeable(GOOD | {"fsdp_version": 2} | keys)


ZERO3 = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_quantized_weights cannot .* Remove",
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}}, "quantizes what is frozen"),
        (
            {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}},
            "compression_training cannot .* base's are packed",
        ),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size cannot .* be split over ranks"),
        ({"tensor_parallel": {"tp": {"tp_size": 2}}}, "tensor_parallel.tp.tp_size cannot"),
        ({"tensor_parallel": {"tensor_parallel": {"tp_size": 2}}}, "tensor_parallel.tensor_parallel.tp_size cannot"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel.enabled cannot .* made for dense experts"),
        ({"expert_parallel": {"autoep_size": 2}}, "expert_parallel.autoep_size cannot"),
        ({"weight_quantization": {"quantized_initialization": {"num_bits": 8}}}, "quantized_initialization cannot"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled is true, but the base is loaded for fp32: .* set bf16: true"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled is true, but the base is loaded for fp32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_file", [True, False])
def test_what_deepspeed_would_do_to_packed_words_is_refused(tmp_path, changes, message, in_file):
    settings: object = ZERO3 | changes
    if in_file:
        (tmp_path / "zero.json").write_text(json.dumps(settings))
        settings = str(tmp_path / "zero.json")
    with pytest.raises(QALoraError, match=message):
        check_deepspeed({"deepspeed": settings, "bf16": False})


def test_a_deepspeed_config_is_there_and_one(tmp_path):
    path = tmp_path / "zero.json"
    with pytest.raises(QALoraError, match=r"there is no file .*zero\.json"):
        check_deepspeed({"deepspeed": str(path)})
    path.write_text("[3]")
    with pytest.raises(QALoraError, match="expected a JSON object"):
        check_deepspeed({"deepspeed": str(path)})
    with pytest.raises(QALoraError, match="deepspeed is 3, expected the path"):
        check_deepspeed({"deepspeed": 3})
    for good in (ZERO3, ZERO3 | {"tensor_parallel": {"autotp_size": 1}}, ZERO3 | {"bf16": {"enabled": True}}):
        path.write_text(json.dumps(good))
        check_deepspeed({"deepspeed": str(path), "bf16": True})
    refuse_deepspeed(ZERO3, "zero.json")
    unused = {"weight_quantization": {"shared_parameters": {"enabled": False}, "different_groups": {}}}
    refuse_deepspeed(ZERO3 | {"compression_training": unused}, "zero.json")


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, None),  # Axolotl's default is auto: what the GPU can do
        ({"bf16": "auto"}, None),
        ({"float16": True}, None),
        ({"bf16": True}, "bf16"),
        ({"bf16": True, "fp16": True}, "bf16"),
        ({"bfloat16": True, "bf16": False}, "bf16"),
        ({"bf16": "auto", "fp16": True}, "fp16"),
        ({"fp16": True}, "fp16"),
        ({"bf16": False, "float16": True}, "fp16"),
        ({"bf16": False}, "fp32"),
        ({"bf16": None, "fp16": False}, "fp32"),
    ],
    ids=str,
)
def test_the_dtype_is_the_one_that_axolotl_loads_in(keys, dtype):
    """Where the machine decides, any mixed precision may be the right one."""
    assert loaded_for(keys) == dtype
    for policy in ("bf16", "fp16"):
        config = GOOD | {"fsdp_version": 2, "fsdp_config": LAYERS | {"mixed_precision_policy": policy}} | keys
        if dtype in (None, policy):
            refuse_unmergeable(config)
            check_deepspeed({"deepspeed": ZERO3 | {policy: {"enabled": True}}} | keys)
        else:
            with pytest.raises(QALoraError, match=f"mixed_precision_policy is {policy}, .* loaded for {dtype}"):
                refuse_unmergeable(config)


def test_axolotls_own_merge_command_drops_the_block_alone():
    """``axolotl merge-lora`` sets ``fsdp_config: None`` and ``merge_lora: True``."""
    refuse_unmergeable(GOOD | {"fsdp_version": 2, "fsdp_config": None, "merge_lora": True})


@pytest.mark.parametrize("rl", ["dpo", "ipo", "kto"])
def test_adapters_that_axolotl_would_save_by_other_names_are_refused(rl):
    with pytest.raises(QALoraError, match=f"rl: {rl} cannot be combined with fsdp_config.* Use DeepSpeed"):
        refuse_unmergeable(GOOD | {"rl": rl, "fsdp_version": 2, "fsdp_config": LAYERS})
    refuse_unmergeable(GOOD | {"rl": rl, "deepspeed": "zero3.json"})


@pytest.mark.parametrize(
    ("engine", "keys"),
    [("FSDP", {"fsdp_version": 2, "fsdp_config": LAYERS}), ("DEEPSPEED", {"deepspeed": "zero3.json"})],
)
def test_an_engine_that_the_launcher_alone_asks_for_is_refused(monkeypatch, engine, keys):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(QALoraError, match=f"asks for {engine} .* but there is no {list(keys)[-1]}"):
        refuse_unmergeable(GOOD)
    refuse_unmergeable(GOOD | keys)
    refuse_unmergeable(GOOD | {"merge_lora": True})


def test_offloading_that_would_save_nothing_is_refused():
    with pytest.raises(QALoraError, match=r"layer_offloading cannot .* fsdp_config.offload_params: true"):
        refuse_unmergeable(GOOD | {"layer_offloading": True})
