"""Damaged and hostile checkpoints before vLLM loads them: a config of ours, or one clear error."""

import random
import shutil
import signal

import pytest
from fuzz.mutate import FILES, mutated_value
from support.merged_checkpoints import make_merged

from qalora_plugin.core.errors import QALoraError
from vllm_ext.config import QALoraConfig

PATIENCE = 10  # seconds


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return make_merged(tmp_path_factory.mktemp("intact"), factored=("up_proj", "q_proj"))


def read(quantization, folder) -> None:
    config = QALoraConfig.from_config(quantization)
    repr(config)
    config.maybe_update_config(str(folder))
    for name in [*config.modules, "model.layers.0.self_attn.qkv_proj", "lm_head"]:
        config._parts(name)


def judge(chance, merged, folder) -> str | None:
    """Damage the config, then perhaps a file; what is wrong with the outcome."""
    quantization = {
        "quant_method": "qalora", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "lm_head": False,
        "checkpoint_format": "gptq", "dynamic": {"-:x": {}}, "offset_dtype": "float16", "format_version": 3,
        "serving_path": "dense", "modules_to_not_convert": ["lm_head"], "base_model": "x", "adapter": "y",
    }  # fmt: skip
    if chance.random() < 0.6:
        quantization = mutated_value(quantization, chance)
        if not isinstance(quantization, dict):
            return None  # vLLM calls with an object
    if chance.random() < 0.6:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(merged, folder / "model")
        (folder / "outside").mkdir()
        path = chance.choice(sorted(path for path in (folder / "model").iterdir() if path.suffix in FILES))
        chance.choice(FILES[path.suffix])(path, chance)
        merged = folder / "model"
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        read(quantization, merged)
    except QALoraError as error:
        return None if str(error).isprintable() and len(str(error)) < 3000 else f"unclear: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error} for {quantization}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


@pytest.mark.parametrize("seed", range(4))
def test_damaged_configs_and_headers(merged, tmp_path, seed):
    def stop(*_):
        raise TimeoutError("hang")

    before = signal.signal(signal.SIGALRM, stop)
    chance = random.Random(seed)
    try:
        faults = [fault for _ in range(150) if (fault := judge(chance, merged, tmp_path / "damaged"))]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not faults, "\n".join(faults)[:3000]
