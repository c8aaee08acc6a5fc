"""What is trained for the accuracy table: one :class:`Job` a run, and what all runs share."""

from dataclasses import asdict, dataclass
from typing import Any

RANK = 16
SEEDS = (0, 1, 2)
RATES = {  # tried on one seed
    "lora": (3e-3, 1e-3, 1e-2),
    "offsets": (1e-2, 3e-3, 2e-2),
    "scales": (1e-2, 3e-3, 2e-2),
    "scale-units": (3e-2, 1e-2),
    "peqa": (3e-3, 1e-3),
    "galore": (1e-3, 3e-4),
}
STEPS = {"gsm8k": 120, "functions": 120}
BATCH = 32  # rows a step
LONGEST = 256  # tokens of a row; longer ones are left out


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        method: a key of :data:`tuning.methods.METHODS`. lr: the peak of its learning rate.
        bits, group_size, clip: of the base; 0, 0, False for methods on the 16-bit model.
    """

    task: str
    method: str
    lr: float
    seed: int
    bits: int = 0
    group_size: int = 0
    clip: bool = False

    @property
    def base(self) -> str:
        """Name of the folder of its base."""
        return base_name(self.bits, self.group_size, self.clip)

    @property
    def name(self) -> str:
        on = f"-{self.base}" if self.bits else ""
        return f"{self.task}-{self.method}{on}-{self.lr:g}-{self.seed}"

    def row(self) -> dict[str, Any]:
        return asdict(self)


def base_name(bits: int, group_size: int, clip: bool) -> str:
    return f"{bits}-{group_size}{'-mse' if clip else ''}"
