"""Pooled LoRAs of other projects, as PEFT saves them: A ``[R, K/p]``, B ``[N, R]``, p columns pooled together.

What differs between them is the factor by which their pooling exceeds the plain sum over p columns, and how they say
that they pool. A format is one instance of :class:`PooledLora`.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qalora_plugin.checkpoint.adapter_folder import CONFIG_NAME, WEIGHTS_NAME
from qalora_plugin.checkpoint.json_files import read_json, short
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.unsupported import peft_refusals

_PICKLE = "adapter_model.bin"
_TO_SAFETENSORS = (
    "import sys, torch; from safetensors.torch import save_file; state = torch.load(sys.argv[1], map_location='cpu', "
    "weights_only=True); save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, sys.argv[2])"
)


@dataclass(frozen=True)
class PooledLora:
    """A way to pool, and to say so.

    Attributes:
        name: for messages.
        factor: ``(K, p)`` → what its pooling is times the sum over p columns.
        check: refuses a config (and its path) that is of another kind.
        pooled: how many columns the config says are pooled together; None if it does not say.
    """

    name: str
    factor: Callable[[int, int], float]
    check: Callable[[dict, Path], None]
    pooled: Callable[[dict], int | None]

    def read_config(self, folder: Path) -> dict[str, Any]:
        """``adapter_config.json`` of an adapter of this kind that a merge can hold.

        Raises:
            QALoraError: it is of another kind, does more than add a pooled product, or is pickled.
        """
        if not folder.is_dir():
            raise QALoraError(f"the adapter folder {folder} does not exist. Pass the training run's output folder.")
        path = folder / CONFIG_NAME
        config = read_json(path)
        if config.get("peft_type") != "LORA":
            raise QALoraError(
                f"{path}: peft_type is {short(config.get('peft_type'))}, expected 'LORA': only those pool. Adapters of "
                "this project need no import."
            )
        self.check(config, path)
        for name, why in peft_refusals(config):
            if name != "use_qalora":  # self.check has looked at it
                raise QALoraError(f"{path}: {name} is {short(config[name])}: {why}. Train without it.")
        if not (folder / WEIGHTS_NAME).is_file() and (folder / _PICKLE).exists():
            raise QALoraError(
                f"{folder} holds its weights as a pickle ({_PICKLE}), which can run code when opened and is never "
                f"read. Convert it: {to_safetensors(folder / _PICKLE, folder / WEIGHTS_NAME)}"
            )
        return config


def to_safetensors(pickle: Path, target: Path) -> str:
    """The command that converts a pickled state dict without running what else it may hold."""
    return shlex.join(["python", "-c", _TO_SAFETENSORS, str(pickle), str(target)])
