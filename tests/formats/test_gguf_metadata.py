"""Configs cross into GGUF and back; what llama.cpp would compute otherwise is refused."""

import gguf
import numpy as np
import pytest
import torch
from support.gguf_files import ARCHITECTURES, make_model, make_tokenizer, rewritten, write_gguf
from support.llama_cpp import LlamaCpp, log_probabilities
from transformers import AutoConfig

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.base import Unsupported
from qalora_plugin.formats.gguf.architectures import of_config, of_file, row_order
from qalora_plugin.formats.gguf.config import config_of
from qalora_plugin.formats.gguf.metadata import metadata
from qalora_plugin.formats.gguf.reading import GgufFile

IDS = list(range(3, 480, 2))
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG = [1.0 + i / 4 for i in range(32)]
SCALED = {
    "linear": ("llama", {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama3": ("llama", LLAMA3),
    "yarn": ("qwen2", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}),
    "longrope": ("phi3", {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": LONG, "short_factor": LONG}),
    "partial": ("phi3", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}),
    "gemma3": (
        "gemma3",
        {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
    ),
}
MEANT = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "rope_parameters", "tie_word_embeddings", "sliding_window", "layer_types",
    "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def with_metadata_of(model, tokenizer, folder):
    """A float32 GGUF of ``model`` whose metadata are ours."""
    architecture = of_config(model.config.to_dict(), "model")
    keys, tensors = metadata(model.config, architecture)
    plain = write_gguf(folder / "plain.gguf", model, tokenizer, "F32", embeddings="F32")

    def replace(fields, stored):
        for key in [key for key in fields if key.startswith(f"{architecture.name}.")]:
            del fields[key]
        kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
        fields |= {f"{architecture.name}.{key}": [value, [kinds[type(value)]]] for key, value in keys.items()}
        stored |= {name: [factors, gguf.GGMLQuantizationType.F32] for name, factors in tensors.items()}

    return rewritten(plain, folder / "model.gguf", replace)


def assert_same_model(model, file):
    """llama.cpp computes it, and its config comes back."""
    with LlamaCpp(file, context=256) as theirs, torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
        error = np.abs(log_probabilities(theirs.logits(IDS), IDS) - log_probabilities(expected, IDS)).mean()
    assert error < 1e-2
    opened = GgufFile.open(file)
    found = config_of(opened, of_file(opened.architecture, file))
    for setting in MEANT:
        wanted, back = getattr(model.config, setting, None), getattr(found, setting, None)
        if isinstance(wanted, dict):
            wanted, back = (flat(parameters) for parameters in (wanted, back))
            assert back == pytest.approx({key: wanted.get(key, back[key]) for key in back} | wanted, rel=1e-6), setting
        else:
            assert back == wanted, setting


def flat(parameters):
    """Without what transformers fills in, lists and layers in one level; numbers only."""
    parts = {"": parameters} if "rope_type" in parameters else parameters
    found = {}
    for layer, settings in parts.items():
        for key, value in settings.items():
            values = value if isinstance(value, list) else [value]
            found |= {f"{layer} {key} {i}": x for i, x in enumerate(values) if not isinstance(x, (str, type(None)))}
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_computes_the_same_by_our_metadata(architecture, tokenizer, tmp_path):
    model = make_model(architecture)
    assert_same_model(model, with_metadata_of(model, tokenizer, tmp_path))


@pytest.mark.parametrize("scaling", SCALED)
def test_scaled_positions(scaling, tokenizer, tmp_path):
    architecture, parameters = SCALED[scaling]
    model = make_model(architecture, rope_parameters=parameters)
    file = with_metadata_of(model, tokenizer, tmp_path)
    assert_same_model(model, file)


def edited(file, target, **changes):
    """Of its keys, without the architecture; None: left out."""

    def change(fields, _tensors):
        name = next(key for key in fields if key.endswith(".block_count")).partition(".")[0]
        for key, value in changes.items():
            kind = gguf.GGUFValueType.UINT32 if isinstance(value, int) else gguf.GGUFValueType.FLOAT32
            fields[f"{name}.{key.replace('__', '.')}"] = [value, [kind]]

    return rewritten(file, target, change)


def read_back(file):
    opened = GgufFile.open(file)
    return config_of(opened, of_file(opened.architecture, file))


def test_yarn_as_others_set_it(tokenizer, tmp_path):
    architecture, parameters = SCALED["yarn"]
    file = with_metadata_of(make_model(architecture, rope_parameters=parameters), tokenizer, tmp_path)
    usual = {"rope__scaling__yarn_beta_fast": 32.0, "rope__scaling__yarn_attn_factor": 1.0}
    assert "beta_fast" not in read_back(edited(file, tmp_path / "usual.gguf", **usual)).rope_parameters
    betas = {"rope__scaling__yarn_beta_fast": 8.0, "rope__scaling__yarn_beta_slow": 2.0}
    found = read_back(edited(file, tmp_path / "betas.gguf", **betas)).rope_parameters
    assert (found["beta_fast"], found["beta_slow"]) == (8.0, 2.0)
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        other = edited(file, tmp_path / f"{key}.gguf", **{f"rope__scaling__{key}": 0.5})
        with pytest.raises(QALoraError, match=rf"'yarn' with {key} 0\.5\. Pass the original model's config"):
            read_back(other)


def test_attention_of_long_contexts(tokenizer, tmp_path):
    architecture, parameters = SCALED["longrope"]
    for attention in (None, 2.5):
        asked = parameters | ({"attention_factor": attention} if attention else {})
        model = make_model(architecture, rope_parameters=asked, original_max_position_embeddings=128)
        found = read_back(with_metadata_of(model, tokenizer, tmp_path)).rope_parameters
        assert found.get("attention_factor") == attention


def test_phi_4_has_no_window(tokenizer, tmp_path):
    """Converters write 0 for it, to tell it from Phi-3."""
    file = with_metadata_of(make_model("phi3"), tokenizer, tmp_path)
    for window, expected in ((0, None), (64, 64)):
        found = read_back(edited(file, tmp_path / f"{window}.gguf", attention__sliding_window=window))
        assert found.sliding_window == expected


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64, but llama.cpp's gemma2 has 32"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "layer_types is"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("qwen3", {"rope_parameters": LLAMA3}, "scales its positions by 'llama3'.*llama.cpp's qwen3"),
        ("llama", {"rope_parameters": {**SCALED["yarn"][1], "attention_factor": 2.0}}, "positions by 'yarn'"),
        ("llama", {"rope_parameters": {**SCALED["yarn"][1], "truncate": False}}, "positions by 'yarn'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(architecture, settings, message):
    model_type, special = ARCHITECTURES[architecture]
    small = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}
    config = AutoConfig.for_model(model_type, **{**small, **special, **settings})
    with pytest.raises(Unsupported, match=message):
        metadata(config, of_config(config.to_dict(), "model"))


@pytest.mark.parametrize(("model_type", "name"), [("mistral", "llama"), ("phi3", "phi3")])
@pytest.mark.parametrize(("window", "context"), [(16, 16), (4096, 1024), (None, 1024)])
def test_a_window_that_llama_cpp_does_not_know_is_the_context(model_type, name, window, context, caplog):
    """Beyond it the two would compute something else."""
    settings = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, sliding_window=window, max_position_embeddings=1024, **settings)
    architecture = of_config(config.to_dict(), "model")
    assert architecture.name == name
    assert metadata(config, architecture)[0]["context_length"] == context
    assert (f"attends to the last {window} tokens" in caplog.text) == (context == window)


def test_only_llama_has_rows_in_another_order():
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
    order = row_order(of_config(config, "x"), config, "model.layers.0.self_attn.q_proj", 8)
    assert order.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert row_order(of_config(config, "x"), config, "model.layers.0.self_attn.k_proj.bias", 4).tolist() == [0, 2, 1, 3]
    assert row_order(of_config(config, "x"), config, "model.layers.0.self_attn.v_proj", 4) is None
    assert row_order(of_config({"model_type": "qwen2"}, "x"), config, "model.layers.0.self_attn.q_proj", 8) is None
    with pytest.raises(QALoraError, match="10 rows, which 2 heads cannot share"):
        row_order(of_config(config, "x"), config, "model.layers.0.self_attn.q_proj", 10)
