"""What some of vLLM's model classes do otherwise than all others."""

# What vLLM fuses where a model class does not say so itself (StableLM, GPT-J).
USUAL_PACKING = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# GPTQModel 7.6 saves Mixtral under transformers 5's names, of which vLLM's class knows the last parts only.
RENAMED = {"MixtralForCausalLM": {".mlp.": ".block_sparse_moe."}}
