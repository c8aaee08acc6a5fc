"""What vLLM reads from a folder before it loads weights, and the errors that a bad one gives."""

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.merged_checkpoints import edit_quantization, make_merged
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.utils import WeightsMapper

from qalora_plugin.core.errors import QALoraError
from vllm_ext import config
from vllm_ext.compat import experts_problem, is_experts
from vllm_ext.config import QALoraConfig


@pytest.fixture
def merged(tmp_path):
    return make_merged(tmp_path)


def read(folder, **kwargs):
    """The engine's config, as `vllm serve` makes it."""
    return EngineArgs(model=str(folder), dtype="bfloat16", max_model_len=64, **kwargs).create_engine_config()


def test_merged_folder_needs_no_flag(merged):
    found = read(merged).quant_config
    assert isinstance(found, QALoraConfig)
    module = found.modules["model.layers.0.mlp.down_proj"]
    assert (module.bits, module.group_size, module.offset_dtype) == (4, 32, "float16")
    assert len(found.modules) == 14


def test_dynamic_exclusions_show_in_the_tensors(tmp_path):
    found = read(make_merged(tmp_path, dense=("down_proj",))).quant_config
    assert found.quantization["dynamic"] == {"-:.*down_proj.*": {}}
    assert not any("down_proj" in name for name in found.modules)


def test_plain_gptq_base_on_request_only(merged):
    base = merged.parent / "base"
    assert isinstance(read(base, quantization="qalora").quant_config, QALoraConfig)
    with pytest.raises(ValueError, match="sym=False"):  # what vLLM itself makes of an asymmetric base
        read(base)


def test_unknown_format_version(merged):
    edit_quantization(merged, format_version=4)
    with pytest.raises(
        ValueError, match=r"format_version is 4, this version of qalora reads 1, 2 and 3\. Update qalora"
    ):
        read(merged)


def test_unknown_checkpoint_format(merged):
    edit_quantization(merged, checkpoint_format="marlin")
    with pytest.raises(ValueError, match="checkpoint_format is 'marlin', expected one of gptq, gptq_v2"):
        read(merged)


def test_offsets_of_wrong_shape(merged):
    offsets = load_file(merged / "offsets.safetensors")
    offsets["model.layers.1.self_attn.q_proj.offsets"] = torch.zeros(4, 256, dtype=torch.float16)
    save_file(offsets, merged / "offsets.safetensors")
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.q_proj: offsets has shape \(4, 256\), expected \(8, 256\)"
    ):
        read(merged)


def test_offsets_file_that_is_not_there(merged):
    (merged / "offsets.safetensors").unlink()
    with pytest.raises(ValueError, match=r"layers\.0\.\S+\.offsets is missing: without it the base would be served"):
        read(merged)


def test_files_that_vllm_does_not_load_are_not_read(merged):
    """Left by a download of an older revision, or another form of the same weights."""
    (merged / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert len(read(merged).quant_config.modules) == 14


def test_merged_checkpoint_without_any_offsets(tmp_path):
    folder = make_merged(tmp_path, targets=())
    with pytest.raises(ValueError, match=r"every \.offsets tensor is missing"):
        read(folder)


def test_impossible_path_is_refused_before_loading(merged, monkeypatch):
    monkeypatch.setenv("QALORA_PATH", "turbo")
    with pytest.raises(ValueError, match=r"serving path .* is 'turbo', expected one of"):
        read(merged)


def test_compiled_graphs_belong_to_the_code_that_chose_their_paths(merged, monkeypatch):
    """vLLM's cache of them is keyed by its config."""
    hashes = {read(merged).model_config.compute_hash()}
    monkeypatch.setattr(config, "_code_hash", lambda: "another version")
    hashes.add(read(merged).model_config.compute_hash())
    assert len(hashes) == 2


def test_names_that_vllm_changes(merged):
    """A rule may end in a dot, as those of vision-language models for ``lm_head`` do."""
    found = read(merged).quant_config
    found.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.layers.0.self_attn.q_proj.": "q."}))
    assert "q" in found.modules
    assert len(found.modules) == 14
    assert "model.norm" in found.weights


def test_fused_parts(merged):
    found = read(merged).quant_config
    found.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    qkv, (q, k, v) = "model.layers.0.self_attn.qkv_proj", (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    assert [part.name for part in found._parts(qkv)] == [q, k, v]
    del found.modules[v]  # Gemma 4: v is k, and not stored
    assert [part.name for part in found._parts(qkv)] == [q, k, k]
    found.weights.add(v)
    with pytest.raises(QALoraError, match=f"quantises only {q}, {k}"):
        found._parts(qkv)


def test_folders_without_readable_headers(merged):
    for file in merged.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="no safetensors header can be read"):
        read(merged)


def test_vllms_sharded_state(merged):
    (merged / "offsets.safetensors").rename(merged / "model-rank-0-part-0.safetensors")
    with pytest.raises(ValueError, match="save_sharded_state"):
        read(merged)


class RoutedExperts(torch.nn.Module):
    """As vLLM's is called since 0.32."""


class FusedMoE(torch.nn.Module):
    """As it was called before."""


def test_experts_that_are_named_otherwise_or_of_an_older_vllm_are_refused(merged):
    config, dense = read(merged).quant_config, "model.layers.0.mlp.up_proj"
    config.modules["model.layers.0.mlp.experts.0.up_proj"] = config.modules.pop(dense)
    with pytest.raises(ValueError, match=r"named like .*experts.0.up_proj, which vLLM does not find as model"):
        config.get_quant_method(RoutedExperts(), "model.layers.0.moe.experts")
    with pytest.raises(ValueError, match=r"on vLLM 0\.32 or newer"):
        config.get_quant_method(FusedMoE(), "model.layers.0.mlp.experts")


@pytest.mark.parametrize(
    ("names", "settings", "reason"),
    [
        (("RoutedExperts",), {}, None),
        (("FusedMoE",), {}, "vLLM 0.32 or newer"),
        (("RoutedExperts", "GptOssRoutedExperts"), {}, r"a class of its own for .* \(GptOssRoutedExperts\)"),
        (("RoutedExperts",), {"swiglu_limit": 10.0}, "clips or scales"),
    ],
)
def test_experts_that_vllm_runs_otherwise_are_known_and_refused(names, settings, reason):
    kind = object
    for name in names:
        kind = type(name, (kind,), {"moe_config": SimpleNamespace(**{"swiglu_limit": None} | settings)})
    assert is_experts(kind())
    found = experts_problem(kind())
    assert (found is None) if reason is None else re.search(reason, found)
