"""What the accuracy table is made of: one :class:`Job` a base, a training run or a quantized merge."""

from dataclasses import dataclass
from typing import Any

TASKS = ("gsm8k", "functions")
RANK = 16
SEEDS = (0, 1, 2)
STEPS = 100
BATCH = 32  # rows a step
LONGEST = 256  # tokens of a row; longer ones are left out
TESTED = 600  # held-out rows at most
QUANTIZE, REQUANTIZE, HEALED = "quantize", "lora-gptq", "lora-gptq-scales"


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        task: a folder of data. method: :data:`QUANTIZE`, :data:`REQUANTIZE`, :data:`HEALED` (half the steps a LoRA on
            16 bits, that merged and quantized, half the steps ours on it) or one of :mod:`tuning.methods`.
        bits, group_size, clip, gptaq: of its base, or of what it quantizes; 0, False for those on the 16-bit model.
        lr: the peak of its learning rate; 0: nothing is trained. rank: of the adapter.
    """

    task: str
    method: str
    bits: int = 0
    group_size: int = 0
    clip: bool = False
    gptaq: bool = False
    lr: float = 0.0
    seed: int = 0
    rank: int = RANK

    @property
    def base(self) -> str:
        """Name of the folder of its base."""
        return f"{self.bits}-{self.group_size}{'-mse' if self.clip else ''}{'-gptaq' if self.gptaq else ''}"

    @property
    def name(self) -> str:
        on = f"-{self.base}" if self.bits else ""
        rank = f"-r{self.rank}" if self.rank != RANK else ""
        return f"{self.task}-{self.method}{on}{rank}-{self.lr:g}-{self.seed}"

    @property
    def lora(self) -> "Job":
        """The run on the 16-bit model that :data:`REQUANTIZE` quantizes."""
        return Job(self.task, "lora", lr=self.lr, seed=self.seed, rank=self.rank)

    @property
    def needs(self) -> str:
        """Of what has to be done before: a base, or a trained LoRA; "" for nothing."""
        if self.method == REQUANTIZE:
            return self.lora.name
        if self.method in (QUANTIZE, HEALED) or not self.bits:
            return ""
        return quantized(self.bits, self.group_size, self.clip, self.gptaq).name


def quantized(bits: int, group_size: int, clip: bool, gptaq: bool) -> Job:
    """The job that makes a base."""
    return Job("base", QUANTIZE, bits, group_size, clip, gptaq)


def job_of(row: dict[str, Any]) -> Job:
    """``row``: of results; older ones know no ``gptaq`` and no ``rank``."""
    return Job(**{name: row[name] for name in Job.__dataclass_fields__ if name in row})
