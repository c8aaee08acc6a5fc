"""Tiny models of transformers' architectures: one set of sizes for all, and what some of them need besides."""

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128
TINY = (
    dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY)
    | dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "embed_dim", "word_embed_proj_dim"), 64)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dff", "ffn_hidden_size", "dim_ff"), 128)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "mamba_d_ssm"), 128)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 2)
    | dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "linear_num_value_heads"), 2)
    | dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "v_head_dim"), 32)
    | dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 32)
    | dict.fromkeys(("kv_lora_rank", "mamba_d_head", "mamba_dt_rank", "time_step_rank", "laurel_rank"), 32)
    | dict.fromkeys(("hidden_size_per_layer_input",), 32)
    | dict.fromkeys(("q_lora_rank", "sliding_window", "attention_window_size", "lru_width"), 64)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("num_experts_per_tok", "moe_k"), 2)
    | dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1)
    | dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1)
    | dict.fromkeys(("mamba_n_heads", "n_mamba_heads"), 4)
    | dict.fromkeys(("mamba_d_state", "state_size", "rotary_dim", "chunk_size", "mamba_chunk_size"), 16)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length"), 256)
    | dict.fromkeys(("initializer_range", "init_std"), 0.1)
    | {"mamba_expand": 2, "num_kv_shared_layers": 0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
)


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """The config of ``model_type`` with every size that it knows made tiny; ``changes`` win."""
    cls = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(cls.__init__).parameters, *getattr(cls, "__dataclass_fields__", ())}
    return cls(**{name: size for name, size in TINY.items() if name in known} | changes)


def tiny_model(config: PretrainedConfig, auto: type) -> PreTrainedModel:
    """Random weights, always the same."""
    torch.manual_seed(0)
    return auto.from_config(config, dtype=torch.float32).eval()


VISION = {
    "image_size": 28, "patch_size": 14, "depth": 2, "out_hidden_size": 64, "projection_dim": 64,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0],
    "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64, "window_size": 28,
}  # fmt: skip


def tiny_composite_config(model_type: str, text: dict | None = None, **changes: Any) -> PretrainedConfig:
    """A wrapper of text and vision with both parts tiny; ``text`` changes the text's config, ``changes`` the whole."""
    cls = CONFIG_MAPPING[model_type]
    default, parts = cls(), {}
    for name in cls.sub_configs:
        part = getattr(default, name, None)
        if part is None:
            continue
        is_text = "text" in name or "llm" in name
        sizes = {key: size for key, size in (TINY | ({} if is_text else VISION)).items() if hasattr(part, key)}
        parts[name] = type(part)(**sizes | ((text or {}) if is_text else {}))
    return cls(**parts | changes)


# What a text model needs besides the sizes above: both kinds of layers where it has several, numbers that fit together.
TEXT: dict[str, dict[str, Any]] = {
    name: {}
    for name in """
    afmoe apertus arcee biogpt bitnet bloom cohere cohere2 cohere2_moe cpmant ctrl cwm deepseek_v2 deepseek_v3
    deepseek_v4 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 falcon falcon_h1 falcon_mamba flex_olmo gemma
    gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gptj
    gpt_oss granite granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax jais2 jetmoe
    llama llama4_text mamba minicpm3 minimax minimax_m3_vl_text ministral ministral3 mistral mixtral
    modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt persimmon phi phi3
    phimoe qwen2 qwen2_moe qwen3 qwen3_moe rwkv seed_oss smollm3 stablelm starcoder2 vaultgemma xglm youtu
    """.split()  # noqa: SIM905
} | {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"n_head": 4, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 32, "head_dim": 4},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2, "num_mem_blocks": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ("recurrent", "recurrent", "attention")},
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
# Wrappers of text and vision, whose text is trained.
VISION_LANGUAGE: dict[str, dict[str, Any]] = {
    name: {}
    for name in """
    aria aya_vision gemma3 idefics2 idefics3 internvl lfm2_vl llama4 llava llava_next llava_onevision mistral3
    ovis2 paligemma qwen3_vl qwen3_vl_moe smolvlm vipllava
    """.split()  # noqa: SIM905
} | {
    "mllama": {"text": {"cross_attention_layers": [1]}},
    "qwen2_5_vl": {"text": {"rope_parameters": MROPE}},
    "qwen2_vl": {"text": {"rope_parameters": MROPE}},
    "qwen3_5": {"text": {"layer_types": ["linear_attention", "full_attention"]}},
}  # fmt: skip
# With the experts quantised as well, as GPTQModel does by default.
EXPERTS = ", experts quantised"
QUANTIZED_EXPERTS = (
    "deepseek_v2", "deepseek_v3", "deepseek_v4", "dots1", "flex_olmo", "glm4_moe", "gpt_oss", "hunyuan_v1_moe",
    "lfm2_moe", "minimax", "minimax_m3_vl_text", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
    "qwen3_next",
)  # fmt: skip


def build(name: str, **changes: Any) -> PreTrainedModel:
    """The tiny model of a name in :data:`TEXT` or :data:`VISION_LANGUAGE`."""
    if name in TEXT:
        return tiny_model(tiny_config(name, **TEXT[name] | changes), AutoModelForCausalLM)
    return tiny_model(tiny_composite_config(name, **VISION_LANGUAGE[name] | changes), AutoModelForImageTextToText)
