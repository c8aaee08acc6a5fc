"""Adapters of PEFT's own ``use_qalora``: ``mean over p columns · K/p``, so ``sum · K/p²``.

(``peft/tuners/lora/variants.py``, ``QALoraLinearVariant.forward``, 0.20 and 0.21. QA-LoRA's paper has the plain sum.)
p is ``qalora_group_size`` of the config, which PEFT never compares with the base's group size. Columns are pooled in
their order, whatever the base's ``g_idx`` says.
"""

from pathlib import Path

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.lora_folder import PooledLora


def _check(config: dict, path: Path) -> None:
    if config.get("use_qalora") is not True:
        raise QALoraError(
            f"{path}: use_qalora is {short(config.get('use_qalora'))}, expected true: this adapter does not pool, so "
            "nothing of it fits into a group's offset. An ordinary LoRA is served unmerged, by PEFT or vLLM."
        )
    pooled = config.get("qalora_group_size")
    if type(pooled) is not int or pooled < 1:
        raise QALoraError(f"{path}: qalora_group_size is {short(pooled)}, expected a positive integer. Save it again.")


PEFT_QALORA = PooledLora(
    name="PEFT's use_qalora",
    factor=lambda in_features, pooled: in_features / pooled**2,
    check=_check,
    pooled=lambda config: config["qalora_group_size"],
)
