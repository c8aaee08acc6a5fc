"""What all ranks of a run must have in common. Every rank calls these, and every rank is told."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from peft import PeftConfig

from qalora_plugin.checkpoint.json_files import short
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.transformers.launched import is_one_of_several

_OF_A_RANK = ("base_model_name_or_path", "qalora", "runtime_config")  # a path, what another check compares


def require_one_base(fingerprint: str) -> None:
    """Refuse to train where ranks have read different bases.

    Raises:
        QALoraError: names the ranks that differ from the first.
    """
    found = _of_all_ranks(fingerprint)
    if others := [rank for rank, other in enumerate(found) if other != found[0]]:
        raise QALoraError(
            f"rank {others[0]} loaded another base than rank 0 ({found[others[0]]}, {found[0]}; "
            f"{len(others)} of {len(found)} ranks differ). Give every node the same checkpoint."
        )


def require_one_adapter(config: PeftConfig, trained_before: str | None = None) -> None:
    """Refuse to train where ranks have different adapters, whose parts would not fit together, or would be mixed.
    Called before anything is shared out.

    Args:
        trained_before: digest of the saved adapter that training goes on from.

    Raises:
        QALoraError: names the first rank that differs, and in what.
    """
    mine = {key: value for key, value in config.to_dict().items() if key not in _OF_A_RANK}
    found = _of_all_ranks(mine | {"the saved adapter": trained_before})
    for rank, other in enumerate(found):
        if key := next((key for key, value in found[0].items() if other.get(key) != value), None):
            raise QALoraError(
                f"rank {rank} trains another adapter than rank 0: {key} is {short(other.get(key))}, there "
                f"{short(found[0][key])}. Give every rank the same settings and saved adapter."
            )


def check_on_rank_0(check: Callable[[], None]) -> None:
    """Have rank 0 look at a file, which another node may not see.

    Raises:
        QALoraError: what ``check`` raised there, on every rank.
    """
    refusal = None
    if not is_one_of_several() or dist.get_rank() == 0:
        try:
            check()
        except QALoraError as error:
            refusal = str(error)
    if first := _of_all_ranks(refusal)[0]:
        raise QALoraError(first)


def _of_all_ranks(mine: Any) -> list[Any]:
    if not is_one_of_several():
        return [mine]
    found: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(found, mine)
    except RuntimeError as error:  # its connection is gone
        raise QALoraError(
            f"another rank ended while rank {dist.get_rank()} waited for it, as one does that cannot load its base or "
            f"its adapter. Its own message, in its own log, says why. (Here: {error})"
        ) from error
    return found
