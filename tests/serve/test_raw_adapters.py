"""An unmerged QA-LoRA adapter is no LoRA: every vLLM refuses it."""

import json
from dataclasses import MISSING, dataclass, fields

import pytest
from vllm.lora import peft_helper

import vllm_ext
from qalora_plugin.core.errors import QALoraError
from vllm_ext.raw_adapters import refuse_raw_adapters

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
RAW = {
    "ours": LORA | {"peft_type": "QALORA", "use_qalora": True, "qalora": {"pooling": "sum"}},
    "ours, a key lost": LORA | {"peft_type": "QALORA"},
    "PEFT's own": LORA | {"use_qalora": True, "qalora_group_size": 32},
}


@dataclass
class OldHelper:
    """As of vLLM 0.26 to 0.31: it reads what it knows, and drops ``use_qalora`` with the rest."""

    r: int
    lora_alpha: int
    target_modules: list[str] | str
    bias: str = "none"

    @classmethod
    def from_dict(cls, config: dict) -> "OldHelper":
        known = {field.name for field in fields(cls)}
        missing = {field.name for field in fields(cls) if field.default is MISSING} - set(config)
        assert not missing
        return cls(**{key: value for key, value in config.items() if key in known})

    @classmethod
    def from_local_dir(cls, path: str, max_position_embeddings: int | None) -> "OldHelper":
        with open(f"{path}/adapter_config.json") as file:
            return cls.from_dict(json.load(file) | {"vllm_max_position_embeddings": max_position_embeddings})


@pytest.fixture(params=["this vLLM", "an old one"])
def helper(request, monkeypatch):
    """vLLM's reader of adapter configs, after ``register()``, which vLLM may call more than once."""
    if request.param == "an old one":
        monkeypatch.setattr(peft_helper, "PEFTHelper", type("PEFTHelper", (OldHelper,), {}))
    for _ in range(2):
        vllm_ext.register()
        refuse_raw_adapters()
    return peft_helper.PEFTHelper


def write(folder, config):
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("kind", RAW)
def test_refused(helper, tmp_path, kind):
    with pytest.raises(QALoraError, match=r"unmerged QA-LoRA adapter.*qalora export lora"):
        helper.from_local_dir(write(tmp_path, RAW[kind]), 256)


def test_other_loras_are_read_as_before(helper, tmp_path):
    found = helper.from_local_dir(write(tmp_path, LORA | {"use_qalora": False}), 256)
    assert (found.r, found.lora_alpha, type(found)) == (4, 8, helper)


def test_refused_under_a_vllm_that_is_too_old_to_serve(monkeypatch, tmp_path):
    import vllm

    monkeypatch.setattr(peft_helper, "PEFTHelper", type("PEFTHelper", (OldHelper,), {}))
    monkeypatch.setattr(vllm, "__version__", "0.20.0")
    vllm_ext.register()
    with pytest.raises(QALoraError, match="unmerged QA-LoRA adapter"):
        peft_helper.PEFTHelper.from_local_dir(write(tmp_path, RAW["ours"]), 256)
