"""Small GGUF files written the way llama.cpp's converter writes them, and the models they are made of.

Nothing of the package's own writer is used: names come from the ``gguf`` package, the order of q's and k's rows is
written out here once more, blocks are quantized by the ``gguf`` package or, where it cannot, drawn at random.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from support.fabricate import quantize
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qalora_plugin.conversion.writer import write_model

TEXT = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
VOCABULARY = 512
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.1,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
# llama.cpp's name → transformers' model type and what is special about the small one
ARCHITECTURES = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "num_hidden_layers": 6},
    ),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
}
_K_QUANTS = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where the float16 scales of a block lie


def make_model(architecture: str, seed: int = 0, **settings):
    """A random model in float32 whose norms and biases are none of them trivial."""
    model_type, special = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**_SIZES, **special, **settings}))
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def gptq_base(
    folder, tokenizer, bits=4, group_size=32, sym=False, act_order=False, dtype=None, architecture="llama", **settings
):
    """A GPTQ base of one of these, whose tokenizer llama.cpp knows."""
    model = make_model(architecture, **settings)
    names = {"architectures": [type(model).__name__], "dtype": "float16"}
    quantization = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": act_order, "sym": sym,
        "checkpoint_format": "gptq_v2",
    }  # fmt: skip
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("proj.weight"):
            stored = quantize(tensor, bits, group_size, sym, "gptq_v2", act_order, torch.Generator().manual_seed(0))
            tensors |= {f"{name[:-6]}{part}": value for part, value in stored.items()}
        elif name != "lm_head.weight" or not model.config.tie_word_embeddings:
            tensors[name] = tensor.to(dtype or torch.float16)
    folder.mkdir()
    write_model(folder, {**json.loads(model.config.to_json_string()), **names}, quantization, tensors.items())
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(pretokenizer=None, bos: bool = False, **bpe) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the README, cut into words as GPT-2 does unless told otherwise."""
    tokenizer = Tokenizer(models.BPE(**bpe))
    tokenizer.pre_tokenizer = pretokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return _wrapped(tokenizer, bos)


def make_sentencepiece(prefix: bool = True) -> PreTrainedTokenizerFast:
    """BPE as SentencePiece has it: spaces as ``▁``, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + [space])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer, trained.pre_tokenizer = space, pre_tokenizers.Metaspace(prepend_scheme="never")
    _train(trained, size=VOCABULARY - 256 - 32, special=("<s>", "</s>", "<pad>", "<unk>"))
    content = json.loads(trained.to_str())["model"]
    ordered = sorted(content["vocab"], key=content["vocab"].get)
    vocabulary = {token: i for i, token in enumerate([*ordered[:4], *pieces, *ordered[4:]])}
    tokenizer.model = models.BPE(
        vocab=vocabulary, merges=[tuple(pair) for pair in content["merges"]], unk_token="<unk>", byte_fallback=True,
        fuse_unk=True,
    )  # fmt: skip
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>"])
    return _wrapped(tokenizer, bos=True, unk_token="<unk>")


def write_gguf(
    path: Path, model, tokenizer, types: dict[str, str] | str, embeddings: str = "F16", seed: int = 0
) -> Path:
    """Write ``model`` as GGUF, and put what the blocks hold back into it: it is then what the file says.

    Args:
        types: of linears, by a part of the GGUF name (``"attn_v"``); ``""`` is for all others. Or of all.
    """
    types = {"": types} if isinstance(types, str) else types
    config, state = model.config, model.state_dict()
    architecture = next(name for name, (kind, _) in ARCHITECTURES.items() if kind == config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, config, architecture)
    write_vocabulary(writer, tokenizer, config.vocab_size)
    table = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    generator = np.random.default_rng(seed)
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        values = tensor.numpy().copy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        permuted = architecture == "llama" and heads
        if permuted:
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if name.endswith("norm.weight") and architecture.startswith("gemma"):
            values = values + 1
        kind = (
            "F32" if values.ndim == 1 else next(types[part] for part in sorted(types, reverse=True) if part in stored)
        )
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            kind = embeddings
        data = quantized(values, kind, generator)
        writer.add_tensor(stored, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        back = data if kind in ("F32", "F16") else gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        back = back.astype(np.float32)
        if permuted:
            back = back.reshape(heads, -1, 2, *back.shape[1:]).swapaxes(1, 2).reshape(back.shape)
        if name.endswith("norm.weight") and architecture.startswith("gemma"):
            back = back - 1
        state[name].copy_(torch.from_numpy(np.ascontiguousarray(back)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rewritten(file: Path, target: Path, change) -> Path:
    """A copy of a GGUF file, edited: ``change(fields, tensors)``, key → [value, types] and name → [data, type]."""
    reader = gguf.GGUFReader(file)
    fields = {key: [f.contents(), f.types] for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {tensor.name: [np.array(tensor.data), tensor.tensor_type] for tensor in reader.tensors}
    change(fields, tensors)
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture")[0])
    for key, (value, types) in fields.items():
        writer.add_key_value(key, value, types[0], sub_type=types[-1] if len(types) > 1 else None)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def in_float32(file: Path, target: Path) -> Path:
    """A copy of a GGUF file, its weights what the blocks hold, in float32: llama.cpp then rounds no activations."""

    def dequantize(_fields, tensors):
        for tensor in tensors.values():
            data, kind = tensor
            if kind != gguf.GGMLQuantizationType.F32:
                tensor[:] = [gguf.quants.dequantize(data, kind), gguf.GGMLQuantizationType.F32]

    return rewritten(file, target, dequantize)


def quantized(values: np.ndarray, kind: str, generator: np.random.Generator) -> np.ndarray:
    """Blocks of ``kind``; for K-quants, which the gguf package cannot make, random ones of about the same size."""
    if kind not in _K_QUANTS:
        return gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[kind])
    return random_blocks(kind, *values.shape, float(np.abs(values).mean()), generator)


def random_blocks(kind: str, rows: int, columns: int, size: float, generator: np.random.Generator) -> np.ndarray:
    """Random bytes whose scales make weights of about ``size``: uint8 ``[rows, bytes of a row]``."""
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = generator.integers(0, 256, (rows, columns // block, nbytes), dtype=np.uint8)
    spread = {"Q4_K": 32 * 8, "Q5_K": 32 * 16, "Q6_K": 64 * 16}.get(kind, 16)
    for place in _K_QUANTS.get(kind) or ((0, 2) if kind.endswith("_1") else (0,)):
        scales = size / spread * generator.uniform(0.5, 2, blocks.shape[:2]) * (8 if place == 2 else 1)
        blocks[..., place : place + 2] = scales.astype("<f2")[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def _write_metadata(writer: gguf.GGUFWriter, config, architecture: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    vocabulary, special = tokenizer.get_vocab(), set(tokenizer.all_special_tokens)
    by_id = {i: token for token, i in vocabulary.items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    kinds = gguf.TokenType
    types = [
        kinds.UNUSED if i not in by_id else kinds.CONTROL if token in special else kinds.NORMAL
        for i, token in enumerate(tokens)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)


def _train(tokenizer: Tokenizer, size: int = VOCABULARY - 32, special=("<s>", "</s>", "<pad>"), **settings) -> None:
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(special), show_progress=False, **settings)
    tokenizer.train_from_iterator([TEXT], trainer)


def _wrapped(tokenizer: Tokenizer, bos: bool, **special) -> PreTrainedTokenizerFast:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        clean_up_tokenization_spaces=False, **special,
    )  # fmt: skip
