"""What some of vLLM's model classes do otherwise than all others."""

# What vLLM fuses where a model class does not say so itself (StableLM, GPT-J).
USUAL_PACKING = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Model classes whose own loading code cannot take packed weights, quantised by whomever.
REFUSED = {
    "BloomForCausalLM": "vLLM reorders the rows of query_key_value while loading, but packed rows run along the input",
    "MiniCPM3ForCausalLM": "vLLM builds q_a_proj without a name, so nothing tells that it is quantised",
    "DeepseekForCausalLM": "vLLM builds its attention's linears without names, so nothing tells what is quantised",
    "Molmo2ForConditionalGeneration": "vLLM builds its linears without names, so nothing tells what is quantised",
}
# GPTQModel 7.6 saves Mixtral under transformers 5's names, of which vLLM's class knows the last parts only.
RENAMED = {"MixtralForCausalLM": {".mlp.": ".block_sparse_moe."}}
