"""What training, merging or serving would refuse is said by Axolotl's validation, before any work: one clear error."""

import shutil

import pytest
from axolotl.cli.config import load_cfg
from support.axolotl_runs import write_config
from support.fabricate import make_adapter, make_base, to_old_layout

from qalora_plugin.checkpoint.json_files import read_json, write_json
from qalora_plugin.core.errors import QALoraError

OURS, MORA = "qalora_plugin.QALoraPlugin", "axolotl.integrations.mora.MoraPlugin"
EXPERTS = "axolotl.integrations.expert_parallel.ExpertParallelPlugin"


def validate(folder, base, **changes):
    return load_cfg(str(write_config(folder, base, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 0}, r"lora_r is 0, expected a whole number above 0, as 16\. Correct it\."),
        ({"lora_r": -8}, "lora_r is -8, expected"),
        ({"lora_r": None}, "needs lora_r"),
        ({"lora_alpha": 0}, "lora_alpha is 0, expected a number above 0"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5, expected at least 0 and below 1"),
        ({"lora_dropout": 1}, "lora_dropout is 1, expected"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1, expected"),
        ({"lora_bias": "all"}, "lora_bias: all cannot be combined .* keeps the base's biases. Remove lora_bias"),
        ({"reinit_weights": True}, "reinit_weights cannot be combined .* random weights"),
        ({"relora": True}, "relora cannot be combined"),
        ({"qlora_sharded_model_loading": True}, "qlora_sharded_model_loading cannot be combined"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: 2 cannot be combined .* packed weights cannot be split"),
        ({"context_parallel_size": 2}, "context_parallel_size: 2 cannot be combined .* need ring attention"),
        ({"plugins": [OURS, EXPERTS], "expert_parallel_size": 2}, "expert_parallel_size: 2 cannot be combined"),
        ({"plugins": [OURS, MORA]}, r"plugins lists axolotl.integrations.mora.MoraPlugin, which brings adapter: mora"),
        ({"plugins": [MORA, OURS]}, r"Remove axolotl.integrations.mora.MoraPlugin"),
        ({"tokens": ["<|a|>"]}, "tokens cannot be combined .* embeddings that train.*Remove tokens"),
        ({"lora_model_dir": "/nowhere"}, "the adapter folder /nowhere does not exist"),
        ({"lora_target_linear": False, "lora_target_modules": ["qproj"]}, r"\['qproj'\] matches no quantised linear"),
        (
            {"lora_target_linear": False, "lora_target_modules": ".*lm_head"},
            "matches no quantised linear .* are: down_",
        ),
        ({"lora_target_linear": False}, "needs lora_target_linear: true or a list"),
        ({"lora_exclude_modules": ".*proj"}, "with lora_exclude_modules matches no quantised linear"),
        ({"peft_layers_to_transform": [9]}, "with peft_layers_to_transform matches no quantised linear"),
        ({"qalora": True}, r"qalora: is True, expected a block of keys \(merge, merge_dir"),
        ({"qalora": "yes"}, "qalora: is 'yes', expected a block of keys"),
        ({"qalora": ["merge"]}, r"qalora: is \['merge'\], expected a block"),
        ({"qalora": 3}, "qalora: is 3, expected a block"),
        ({"qalora": {1: 2}}, "unknown key '1' in qalora:"),
        ({"qalora": {"merg": True}}, "unknown key 'merg' in qalora:. Did you mean 'merge'"),
        ({"qalora": {"offset_dtype": "int8"}}, "qalora.offset_dtype is 'int8': .*'float16' or 'float32'"),
        ({"qalora": {"verify_tokens": 0}}, "qalora.verify_tokens is 0: .*greater than or equal to 2"),
        ({"qalora": {"merge": "perhaps"}}, "qalora.merge is 'perhaps': "),
        ({"qalora": {"merge_dir": 5}}, "qalora.merge_dir is 5: "),
        ({"qalora": {"merge_dir": "/proc/merged"}}, "qalora.merge_dir is /proc/merged, but /proc is not writable"),
        ({"output_dir": "/proc/out"}, "output_dir is /proc/out, but /proc is not writable"),
        ({"output_dir": "/etc/hostname/out"}, "output_dir is /etc/hostname/out, but /etc/hostname is a file"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refused(base, tmp_path, changes, message):
    with pytest.raises(QALoraError, match=f"(?s){message}"):
        validate(tmp_path, base, **changes)


def test_the_base_is_never_written_to(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "base")
    link = tmp_path / "link"
    link.symlink_to(folder)
    for out in (folder, folder / "out", link / "out"):
        with pytest.raises(QALoraError, match=r"output_dir is .*, which is the base's folder, or inside it"):
            validate(tmp_path, folder, output_dir=str(out))
    with pytest.raises(QALoraError, match=r"qalora.merge_dir is .*merged, which is the base's folder, or inside it"):
        validate(tmp_path, folder, qalora={"merge_dir": str(link / "merged")})


def test_merge_and_run_in_each_others_way(base, tmp_path):
    for output_dir in (tmp_path / "out", tmp_path / "out" / "run"):
        with pytest.raises(QALoraError, match="so it would exist when the merge begins"):
            validate(tmp_path, base, output_dir=str(output_dir), qalora={"merge_dir": str(tmp_path / "out")})


def test_home_is_expanded(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").symlink_to(base)
    cfg = validate(tmp_path, "~/base", output_dir="~/out", qalora={"merge_dir": "~/merged"})
    assert (cfg.base_model, cfg.output_dir) == (str(tmp_path / "base"), str(tmp_path / "out"))
    (tmp_path / "merged").mkdir()
    from qalora_plugin.integrations.axolotl.preflight import check_merge_dir

    with pytest.raises(QALoraError, match=rf"{tmp_path}/merged exists.*remove it, set qalora.merge_dir"):
        check_merge_dir(cfg)


def test_adapter_of_another_kind_of_base(base, tmp_path):
    coarse = make_base(tmp_path / "coarse", group_size=64)
    adapter = make_adapter(coarse, tmp_path / "adapter")
    with pytest.raises(QALoraError, match="belongs to a base with another group size"):
        validate(tmp_path, base, lora_model_dir=str(adapter))
    validate(tmp_path, coarse, lora_model_dir=str(adapter))


def test_targets_of_which_some_are_missing_are_named(base, tmp_path, caplog):
    targets = {"lora_target_linear": False, "lora_target_modules": ["q_proj", "query"]}
    validate(tmp_path, base, **targets, lora_rank_pattern={"kproj": 4})
    assert "query is no quantised linear of this base and gets no adapter" in caplog.text
    assert "lora_rank_pattern: kproj matches no quantised linear" in caplog.text


def test_bits_that_differ_inside_what_vllm_fuses(tmp_path, caplog):
    base, fine = make_base(tmp_path / "base"), make_base(tmp_path / "fine", bits=8)
    config = read_json(base / "config.json")
    config["quantization_config"]["dynamic"] = {"+:.*up_proj": {"bits": 8}}
    write_json(base / "config.json", config)
    replace_linears(base, fine, "mlp.up_proj")
    validate(tmp_path, base)
    assert "vLLM runs gate_proj, up_proj as one layer, but this base quantises them differently" in caplog.text
    assert "gate_proj (4 bit, group size 32), model.layers.0.mlp.up_proj (8 bit, group size 32)" in caplog.text


def replace_linears(base, other, leaf):
    """Put the linears named ``leaf`` of another quantisation into ``base``."""
    from safetensors.torch import load_file, save_file

    mine, theirs = (load_file(folder / "model.safetensors") for folder in (base, other))
    mine |= {name: tensor for name, tensor in theirs.items() if f"{leaf}." in name}
    save_file(mine, base / "model.safetensors", metadata={"format": "pt"})


def test_base_without_bits(base, adapter, tmp_path):
    """Its tensors show them."""
    from qalora_plugin.conversion.merging import merge

    folder = shutil.copytree(base, tmp_path / "base")
    config = read_json(folder / "config.json")
    del config["quantization_config"]["bits"], config["quantization_config"]["group_size"]
    write_json(folder / "config.json", config)
    validate(tmp_path, folder)
    merged = merge(folder, adapter, tmp_path / "merged", progress=False).folder
    found = read_json(merged / "config.json")["quantization_config"]
    assert (found["bits"], found["group_size"]) == (4, 32)


def test_old_autogptq_folder(tmp_path):
    """Axolotl reads the model's config itself: it is told what stands beside it."""
    base = to_old_layout(make_base(tmp_path / "base"))
    cfg = validate(tmp_path, base)
    assert cfg.overrides_of_model_config["transformers_weights"] == "gptq_model-4bit-32g.safetensors"
    assert cfg.overrides_of_model_config["quantization_config"]["bits"] == 4
