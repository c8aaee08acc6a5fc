"""Zero biases of every linear, as tools of 2023 stored them: llama.cpp loads no file with one that it does not know."""

import pytest
from safetensors.torch import load_file, save_file
from support.gguf_files import gptq_base, make_tokenizer
from support.llama_cpp import LlamaCpp

from qalora_plugin.conversion.export_gguf import export_gguf
from qalora_plugin.conversion.model_class import idle_biases
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.opened import QuantizedCheckpoint

OWN = {"llama": (), "qwen2": ("q_proj", "k_proj", "v_proj"), "qwen3": ()}


@pytest.mark.parametrize("architecture", OWN)
def test_they_are_left_out(architecture, tmp_path):
    base = gptq_base(tmp_path / "base", make_tokenizer(), architecture=architecture)
    file = base / "model.safetensors"
    tensors = load_file(file)
    linears = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    zeros = {f"{name}.bias": 0 * tensors[f"{name}.scales"][0] for name in linears}
    save_file(zeros | tensors, file, metadata={"format": "pt"})
    idle = {f"{name}.bias" for name in linears if not name.endswith(OWN[architecture])}
    assert idle_biases(QuantizedCheckpoint.open(base)) == idle
    export_gguf(base, tmp_path / "model.gguf", progress=False)
    with LlamaCpp(tmp_path / "model.gguf", context=64) as theirs:
        assert len(theirs.logits([3, 4, 5])) == 3
    odd = sorted(idle)[0]
    save_file(zeros | tensors | {odd: zeros[odd] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(Unsupported, match=f"holds {odd}, which is not zero"):
        export_gguf(base, tmp_path / "other.gguf", progress=False)
    assert not (tmp_path / "other.gguf").exists()
