"""What Axolotl users combine with an adapter, each a real training run through Axolotl's own entry point."""

import json
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from support.axolotl_runs import BIN, command, losses, train_here, write_config
from support.fabricate import make_base, to_old_layout

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval.verifying import verify

pytestmark = pytest.mark.e2e


def train_and_prove(folder, base, **changes):
    train_here(write_config(folder, base, **changes))
    out = folder / "out"
    report = verify(base, out, out / "merged", device="cpu", max_tokens=512, progress=False)
    assert report.passed
    assert losses(out)[-1] < losses(out)[0]
    return out, report


def test_old_autogptq_folder(tmp_path):
    """Settings in quantize_config.json, weights under a name of their own, in shards."""
    train_and_prove(tmp_path, to_old_layout(make_base(tmp_path / "base", shards=2)))


def test_a_merged_model_is_a_base(merged, tmp_path):
    """The new adapter's offsets are added to those that are there."""
    out, _ = train_and_prove(tmp_path, merged)
    config = json.loads((out / "merged" / "config.json").read_text())["quantization_config"]
    assert config["base_model"] == str(merged)
    assert config["offset_dtype"] == "float32"


def test_every_lora_key_at_once_in_bf16(tmp_path):
    """Act-order, symmetric, sharded, with biases; patterns, exclusion, rsLoRA, dropout, bf16."""
    base = make_base(tmp_path / "base", hidden=128, act_order=True, shards=2, bias=True, sym=True)
    out, report = train_and_prove(
        tmp_path,
        base,
        bf16=True,
        lora_dropout=0.1,
        lora_target_linear=None,
        lora_target_modules=["q_proj", "up_proj", "down_proj"],
        lora_exclude_modules=["layers.0.mlp.down_proj"],
        lora_rank_pattern={"q_proj": 4},
        lora_alpha_pattern={"up_proj": 8},
        peft_use_rslora=True,
    )
    shapes = {name: tuple(t.shape) for name, t in load_file(out / "adapter_model.safetensors").items()}
    assert report.modules == 5
    assert not any("layers.0.mlp.down_proj" in name for name in shapes)
    assert shapes["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] == (4, 4)  # [R, G]
    assert shapes["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"] == (8, 8)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["use_rslora"]
    assert config["alpha_pattern"] == {"up_proj": 8}


def test_sample_packing_and_merge_dir(base, tmp_path):
    train_here(
        write_config(
            tmp_path,
            base,
            sample_packing=True,
            eval_sample_packing=False,
            gradient_checkpointing=False,
            qalora={"merge_dir": str(tmp_path / "elsewhere"), "offset_dtype": "float32", "copy_base": True},
        )
    )
    report = verify(base, tmp_path / "out", tmp_path / "elsewhere", device="cpu", max_tokens=512, progress=False)
    assert report.passed
    assert report.offset_dtype == "float32"
    assert not (tmp_path / "out" / "merged").exists()


def test_lora_model_dir_continues_an_adapter(base, adapter, tmp_path):
    """The adapter given by lora_model_dir is where training starts from."""
    train_here(
        write_config(
            tmp_path, base, lora_model_dir=str(adapter), max_steps=1, learning_rate=1e-9, lora_r=4, lora_alpha=8
        )
    )
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=0, atol=1e-7)
    assert (tmp_path / "out" / "merged").is_dir()


def test_dpo(base, tmp_path):
    rows = [{"prompt": f"say {i}", "chosen": f"number {i} is good", "rejected": "no"} for i in range(32)]
    (tmp_path / "dpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {f"field_{name}": name for name in ("prompt", "chosen", "rejected")}
    dataset = {"path": str(tmp_path / "dpo.jsonl"), "ds_type": "json", "split": "train", "type": fields}
    out, _ = train_and_prove(tmp_path, base, rl="dpo", datasets=[dataset], val_set_size=None, eval_steps=None)
    assert losses(out)[0] == pytest.approx(0.6931, abs=1e-3)  # the reference is the adapter switched off
    assert not (out / "model.safetensors").exists()


LIGER = {
    "plugins": ["qalora_plugin.QALoraPlugin", "axolotl.integrations.liger.LigerPlugin"],
    "liger_rope": True,
    # 0.8.4 calls `.to` of a scalar there, which Triton's interpreter passes as a Python float; 0.8.1 does not
    "liger_glu_activation": torch.cuda.is_available() or Version(version("liger-kernel")) <= Version("0.8.1"),
    "liger_fused_linear_cross_entropy": True,
    # not liger_rms_norm: it calls libdevice, which Triton's interpreter lacks
}


def losses_of_a_short_run(folder, base, adapter, **changes):
    """Of a process of its own, as speed-ups patch what they find. It starts from ``adapter``: Axolotl seeds no A."""
    config = write_config(
        folder, base, lora_model_dir=str(adapter), lora_r=4, lora_alpha=8, max_steps=2, save_steps=2,
        micro_batch_size=1, gradient_accumulation_steps=1, val_set_size=None, eval_steps=None,
        qalora={"merge": False}, **changes,
    )  # fmt: skip
    output = command(BIN / "axolotl", "train", config)
    assert ("Applying LIGER" in output) == ("plugins" in changes)
    return losses(folder / "out")


@pytest.fixture(scope="module")
def plain_losses(base, adapter, tmp_path_factory):
    return losses_of_a_short_run(tmp_path_factory.mktemp("plain"), base, adapter)


@pytest.mark.parametrize("changes", [LIGER, {"torch_compile": True}], ids=["liger", "torch_compile"])
def test_axolotls_own_speedups_change_no_loss(base, adapter, plain_losses, tmp_path, changes):
    """Without a GPU, Liger's kernels run in Triton's interpreter."""
    assert losses_of_a_short_run(tmp_path, base, adapter, **changes) == pytest.approx(plain_losses, rel=1e-5)


def refused(folder, base, match, **changes):
    config = write_config(folder, base, **changes)
    with pytest.raises((QALoraError, ValueError), match=match):
        train_here(config)
    assert not (folder / "prepared").exists()  # nothing was tokenised


def test_bad_configs_stop_before_any_work(base, tmp_path):
    refused(tmp_path, base, "lora_mlp_kernel cannot be combined", lora_mlp_kernel=True)
    refused(tmp_path, base, "unknown key 'merge_dtype' in qalora:", qalora={"merge_dtype": "float32"})
    refused(tmp_path, tmp_path / "nowhere", "does not exist")
    refused(tmp_path, base, "not registered by a plugin", adapter="qalorra")
    (tmp_path / "out" / "merged").mkdir(parents=True)
    refused(tmp_path, base, "It is where this run's merge would go")
