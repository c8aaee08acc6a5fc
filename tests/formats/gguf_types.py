"""Tiny Llamas in GGUF files, every linear of one type: blocks of random codes, written and dequantized by gguf-py."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from support.gguf_files import VOCABULARY, make_tokenizer, write_vocabulary
from torch import Tensor

HIDDEN, INTERMEDIATE = 256, 512  # K-quants have blocks of 256
_FLOATS = {  # where the float16 of a block are, in bytes; all else are codes
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
_LINEARS = {
    "attn_q": ("self_attn.q_proj", HIDDEN, HIDDEN), "attn_k": ("self_attn.k_proj", HIDDEN, HIDDEN),
    "attn_v": ("self_attn.v_proj", HIDDEN, HIDDEN), "attn_output": ("self_attn.o_proj", HIDDEN, HIDDEN),
    "ffn_gate": ("mlp.gate_proj", INTERMEDIATE, HIDDEN), "ffn_up": ("mlp.up_proj", INTERMEDIATE, HIDDEN),
    "ffn_down": ("mlp.down_proj", HIDDEN, INTERMEDIATE),
}  # fmt: skip
_REORDERED = ("attn_q", "attn_k")  # llama.cpp has their rows in another order: left out of the comparison


@dataclass(frozen=True)
class GgufType:
    """A type of llama.cpp's, by its name."""

    name: str
    column = "weights"

    @property
    def line(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name

    def sample(self, folder: Path) -> "GgufSample":
        return GgufSample(self, folder)


TYPES = tuple(map(GgufType, _FLOATS))


class GgufSample:
    def __init__(self, case: GgufType, folder: Path):
        self.case, self.folder = case, folder
        folder.mkdir(parents=True)

    @cached_property
    def tokenizer(self) -> Path:
        make_tokenizer().save_pretrained(self.folder / "tokenizer")
        return self.folder / "tokenizer"

    @cached_property
    def blocks(self) -> dict[str, np.ndarray]:
        """Of every linear, by llama.cpp's names: uint8 ``[N, bytes of a row]``."""
        import gguf

        size, nbytes = gguf.constants.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.case.name]]
        generator, found = np.random.default_rng(0), {}
        for name, (_, out_features, in_features) in _LINEARS.items():
            blocks = generator.integers(0, 256, (out_features, in_features // size, nbytes), dtype=np.uint8)
            for start in _FLOATS[self.case.name]:
                floats = generator.uniform(1e-4, 1e-3, blocks.shape[:2]).astype(np.float16)
                blocks[..., start : start + 2] = floats[..., None].view(np.uint8)
            found[name] = blocks.reshape(out_features, -1)
        return found

    @cached_property
    def file(self) -> Path:
        import gguf

        path = self.folder / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(1)
        writer.add_context_length(256)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INTERMEDIATE)
        writer.add_head_count(4)
        writer.add_head_count_kv(4)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10000.0)
        writer.add_rope_dimension_count(HIDDEN // 4)
        writer.add_vocab_size(VOCABULARY)
        write_vocabulary(writer, make_tokenizer(), VOCABULARY)
        for name, rows in {"token_embd": VOCABULARY, "output": VOCABULARY}.items():
            writer.add_tensor(f"{name}.weight", np.full((rows, HIDDEN), 0.02, np.float16))
        for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
            writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
        for name, blocks in self.blocks.items():
            kind = gguf.GGMLQuantizationType[self.case.name]
            writer.add_tensor(f"blk.0.{name}.weight", blocks, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    @property
    def weights(self) -> dict[str, Tensor]:
        """By their names in transformers, ``[K, N]``, as gguf-py dequantizes."""
        import gguf

        kind = gguf.GGMLQuantizationType[self.case.name]
        return {
            f"model.layers.0.{module}": torch.from_numpy(gguf.quants.dequantize(self.blocks[name], kind)).t().double()
            for name, (module, *_) in _LINEARS.items()
            if name not in _REORDERED
        }
