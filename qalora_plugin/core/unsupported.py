"""What cannot be combined with QA-LoRA: each option once, under the names it has in Axolotl and in PEFT, and why."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from qalora_plugin.core.errors import QALoraError


class _Refusal(NamedTuple):
    """An option whose effect a merge could not hold, or that would break the adapter.

    Attributes:
        why: follows "… cannot be combined with QA-LoRA: ".
        axolotl: its keys in Axolotl's config, ``block.key`` inside a block.
        peft: its fields in PEFT's ``LoraConfig``.
        allowed: values that ask for nothing of the kind, besides those that are false.
        instead: what to do other than to remove it.
    """

    why: str
    axolotl: tuple[str, ...] = ()
    peft: tuple[str, ...] = ()
    allowed: tuple[object, ...] = ()
    instead: str = ""


_KERNELS = (
    "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel", "dsv4_fp8_lora_kernel",
    "dsv4_shared_mlp_lora_kernel",
)  # fmt: skip
_SPLIT_WEIGHTS = "packed weights cannot be split over ranks while training"
_SPLIT_EXPERTS = "its all-to-all exchange is made for dense experts, and a packed layer would not take part"
_SPLIT_SEQUENCES = (
    "sequences split over ranks need ring attention, which GPUs alone have, and no run has shown that they train this "
    "adapter as whole ones do"
)
_SENT_TO_VLLM = "TRL sends vLLM merged weights or a plain LoRA, and this adapter is neither"
_TABLE = (
    # what a LoRA would do otherwise
    _Refusal("the fused LoRA kernels would bypass the pooling", _KERNELS),
    _Refusal("it is PEFT's own pooling, scaled differently; this adapter pools already", peft=("use_qalora",)),
    _Refusal("GPTQ linears have one orientation", ("lora_fan_in_fan_out",), ("fan_in_fan_out",)),
    _Refusal(
        "it is another form of LoRA, with parts that this adapter does not have",
        peft=("alora_invocation_tokens", "arrow_config", "monteclora_config", "use_bdlora", "velora_config"),
    ),
    # what a merged checkpoint could not hold
    _Refusal(
        "DoRA scales whole columns, which no group-wise offset can express", ("peft_use_dora",), ("use_dora",)
    ),
    _Refusal(
        "a dense copy of a layer cannot be merged into an INT4 base", ("lora_modules_to_save",), ("modules_to_save",)
    ),
    _Refusal("only linear layers have quantisation groups", ("lora_target_parameters",), ("target_parameters",)),
    _Refusal("a merged checkpoint has the base's layers", ("peft_layer_replication",), ("layer_replication",)),
    _Refusal(
        "embeddings are not quantised, so changes to them cannot be merged",
        ("peft_trainable_token_indices",),
        ("trainable_token_indices",),
    ),
    _Refusal("a merged checkpoint keeps the base's biases", ("lora_bias",), ("bias", "lora_bias"), allowed=("none",)),
    _Refusal(
        "new tokens would need embeddings that train, and a merged checkpoint has the base's",
        ("tokens",),
        instead="Remove tokens, and use some that the base's tokenizer has.",
    ),
    _Refusal("base weights that train cannot be merged", ("unfrozen_parameters",)),
    _Refusal(
        "it rewrites embeddings, which a merged checkpoint takes from the base", ("fix_untrained_tokens",)
    ),
    _Refusal("its score head is dense and trains, which cannot be merged", ("reward_model", "process_reward_model")),
    # what would change the base
    _Refusal(
        "it rewrites the base weight, which stays packed",
        ("peft_init_lora_weights",),
        ("init_lora_weights",),
        allowed=(True, "gaussian"),
        instead="Use true or 'gaussian'.",
    ),
    _Refusal("LoftQ rewrites the base weight, which stays packed", ("peft",)),
    _Refusal("it rewrites linears by their dense weights", ("flash_attn_fuse_mlp", "use_onebitllms")),
    _Refusal("it merges into the base while training, which stays packed", ("relora",)),
    _Refusal("random weights have no quantised base to be merged into", ("reinit_weights",)),
    _Refusal(
        "the base is quantised already",
        (
            "qat", "quantize_moe_experts", "nonexpert_quantization", "gemma4_nf4_nonexpert", "gemma4_fp8_nonexpert",
            "model_quantization_config",
        ),
    ),
    _Refusal("it prunes or quantises the base while training, which stays packed", ("llmcompressor",)),
    _Refusal(
        "it would compute the adapter's factors in 8 bits, and a merge is exact",
        ("fp8", "fp8_enable_fsdp_float8_all_gather"),
        instead="Set bf16: true.",
    ),
    _Refusal(
        "the base is GPTQ already; bitsandbytes would quantise it twice", ("load_in_4bit", "load_in_8bit")
    ),
    _Refusal("it loads bitsandbytes weights, and the base is GPTQ", ("qlora_sharded_model_loading",)),
    # other ways to run
    _Refusal(
        "it is the key of FSDP1, which flattens what trains together with what does not; FSDP2's are fsdp_version: 2 "
        "and fsdp_config",
        ("fsdp",),
    ),
    _Refusal(_SPLIT_WEIGHTS, ("tensor_parallel_size",), allowed=(1,)),
    _Refusal(_SPLIT_EXPERTS, ("expert_parallel_size",), allowed=(1,)),
    _Refusal(
        _SPLIT_SEQUENCES,
        ("context_parallel_size", "sequence_parallel_degree"),
        allowed=(1,),
        instead="Set it to 1; FSDP2 and gradient_checkpointing save memory, too.",
    ),
    _Refusal(
        "it moves parameters to the CPU and back, and packed weights are none, so that it would save nothing",
        ("layer_offloading",),
        instead="Remove layer_offloading; FSDP2 with fsdp_config.offload_params: true keeps packed weights there.",
    ),
    _Refusal(
        _SENT_TO_VLLM,
        ("trl.use_vllm",),
        instead="Set trl.use_vllm: false.",
    ),
)  # fmt: skip

_DEEPSPEED = (
    ("zero_optimization.zero_quantized_weights", "it quantizes what ranks send each other, which packed words are"),
    ("zero_optimization.zero_quantized_nontrainable_weights", "it quantizes what is frozen, which packed words are"),
    ("tensor_parallel.autotp_size", _SPLIT_WEIGHTS),
    ("tensor_parallel.tp_size", _SPLIT_WEIGHTS),
    ("tensor_parallel.tp.tp_size", _SPLIT_WEIGHTS),
    ("tensor_parallel.tensor_parallel.tp_size", _SPLIT_WEIGHTS),
    ("expert_parallel.enabled", _SPLIT_EXPERTS),
    ("expert_parallel.autoep_size", _SPLIT_EXPERTS),
    ("weight_quantization.quantized_initialization", "it quantizes weights as they are loaded, which packed words are"),
)


# transformers 5.16's Adafactor and bitsandbytes 0.49 compute with whole tensors, and FSDP2 hands them parts (DTensors).
_NOT_WITH_FSDP2 = ("adafactor", "ademamix", "lion_8bit", "lion_32bit", "paged_", "rmsprop_bnb")


def refuse_optimizer_of_fsdp2(name: str, key: str) -> None:
    """Refuse an optimizer that would fail at the first step; ``key``: the option that names it.

    Raises:
        QALoraError: names it, and what to use.
    """
    if name.startswith(_NOT_WITH_FSDP2):
        raise QALoraError(
            f"{key}: {name} cannot be combined with FSDP2: it computes with whole parameters. Use adamw_torch "
            "(adamw_torch_8bit needs less memory), or DeepSpeed instead of FSDP."
        )


def refuse_vllm(arguments: object) -> None:
    """Refuse what TRL's arguments have vLLM generate.

    Raises:
        QALoraError: why, and what to do.
    """
    if getattr(arguments, "use_vllm", False):
        raise QALoraError(f"use_vllm=True cannot be combined with QA-LoRA: {_SENT_TO_VLLM}. Leave use_vllm out.")


def refuse_parallelism(config: object) -> None:
    """Refuse what of accelerate's ``ParallelismConfig`` splits a layer or a sequence over ranks.

    Raises:
        QALoraError: names the field, why it is refused, and what to do.
    """
    for name, why in (("tp_size", _SPLIT_WEIGHTS), ("cp_size", _SPLIT_SEQUENCES), ("sp_size", _SPLIT_SEQUENCES)):
        if (size := getattr(config, name, None) or 1) > 1:
            raise QALoraError(f"ParallelismConfig: {name}={size} cannot be combined with QA-LoRA: {why}. Set it to 1.")


def refuse_deepspeed(settings: Mapping[str, Any], where: str) -> None:
    """Refuse what of a DeepSpeed config would change or split packed words.

    Args:
        where: the config's path, for the error.

    Raises:
        QALoraError: names the key, why it is refused, and what to do.
    """
    for name, why in _DEEPSPEED:
        row = _Refusal(why, (name,), allowed=(1,) if name.endswith("size") else ())  # (True is 1)
        for key, _ in _asked_for(row, row.axolotl, settings):
            raise QALoraError(f"{where}: {key} cannot be combined with QA-LoRA: {why}. Remove {key}.")
    if _is_enabled(settings.get("compression_training")):
        raise QALoraError(
            f"{where}: compression_training cannot be combined with QA-LoRA: it prunes or quantizes weights, and the "
            "base's are packed. Remove compression_training."
        )


def _is_enabled(block: Any) -> bool:
    """Whether anything inside is ``enabled``."""
    if not isinstance(block, Mapping):
        return False
    return bool(block.get("enabled")) or any(_is_enabled(inner) for inner in block.values())


def refuse_axolotl_keys(cfg: Mapping[str, Any]) -> None:
    """Refuse what of the table a raw Axolotl config asks for.

    Raises:
        QALoraError: names the key, why it is refused, and what to do.
    """
    for row in _TABLE:
        for key, value in _asked_for(row, row.axolotl, cfg):
            given = f"{key}: {value}" if row.allowed else key
            raise QALoraError(
                f"{given} cannot be combined with adapter: qalora: {row.why}. {row.instead or f'Remove {key}.'}"
            )


def refuse_peft_fields(config: object) -> None:
    """Refuse what of the table a ``LoraConfig`` asks for.

    Raises:
        QALoraError: names the field, why it is refused, and what to do.
    """
    for row, name, value in _peft_refusals(vars(config)):
        given = f"{name}={value!r}" if row.allowed else name
        raise QALoraError(f"{given} cannot be combined with QA-LoRA: {row.why}. {row.instead or f'Remove {name}.'}")


def peft_refusals(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What of the table a stored ``adapter_config.json`` asks for: the field, and why it is refused."""
    for row, name, _ in _peft_refusals(config):
        yield name, row.why


def _peft_refusals(config: Mapping[str, Any]) -> Iterator[tuple[_Refusal, str, Any]]:
    for row in _TABLE:
        for name, value in _asked_for(row, row.peft, config):
            yield row, name, value


def _asked_for(row: _Refusal, names: Iterable[str], options: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name in names:
        value: Any = options
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value and value not in row.allowed:
            yield name, value
