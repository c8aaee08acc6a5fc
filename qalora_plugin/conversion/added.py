"""What a merge adds to each linear, as it is stored: offsets, dense or factored, and changes of scales."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.tensors import all_finite
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.core.folding import factor, fold, fold_workers, squared_norm
from qalora_plugin.core.weight import GroupwiseSpec
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.formats.qalora import AUTO, FACTORED, FACTORS, require_offset_form
from qalora_plugin.formats.served_bits import dtype_bits, offset_bits

_SAMPLED_GROUPS = 8  # of each linear, to tell how much float16 would lose
_SMALL = 1e-4  # mean square roots below this may suffer in float16, which loses digits below 6e-5
_TOO_LARGE = {"float16": "Use offset_dtype float32", "float32": "The training diverged"}


@dataclass(frozen=True)
class Added:
    """What is stored of one linear's offsets, or of its changed scales.

    Attributes:
        tensors: by their names on disk. part: ``"offsets"`` or ``"scales_delta"``.
        wanted: the squared norm of what the adapter adds. lost: of what rounding takes.
    """

    tensors: dict[str, np.ndarray]
    part: str
    wanted: float
    lost: float


def merged_specs(base: QuantizedCheckpoint, adapter: AdapterFolder, dtype: str, form: str) -> dict[str, GroupwiseSpec]:
    """Every linear of the merge, in the base's order.

    Args:
        dtype: of offsets and changes of scales.
        form: of the adapted linears' offsets: ``"dense"``, ``"factored"``, or ``"auto"``: factored where that takes
            fewer bytes. Onto dense offsets of the base only dense ones can be added, and so are those in units of
            trained scales, which are no product.

    Raises:
        QALoraError: there is no such form, or factors cannot be had.
    """
    require_offset_form(form)
    specs = dict(base.specs)
    for name in adapter.modules:
        specs[name] = merged_spec(base.specs[name], adapter.rank(name), dtype, form, adapter.has_scales)
    return specs


def usual_dtype(specs: Iterable[GroupwiseSpec]) -> str:
    """Of what a merge adds: where the base has offsets or changed scales already, in more than 16 bits."""
    return "float32" if any(spec.offset_dtype or spec.scales_delta_dtype for spec in specs) else "float16"


def merged_spec(spec: GroupwiseSpec, rank: int, dtype: str, form: str = AUTO, scales: bool = False) -> GroupwiseSpec:
    """What a linear of the base becomes with an adapter of this rank, and trained scales or none."""
    changed = dtype if scales else spec.scales_delta_dtype
    dense = replace(spec, offset_dtype=dtype, offset_rank=0, scales_delta_dtype=changed)
    factored = replace(dense, offset_rank=min(spec.offset_rank + rank, spec.groups))
    if scales:
        if form == FACTORED:
            raise QALoraError(
                f"the offsets of {spec.name} are in units of the scales that were trained beside them: no two factors "
                "make them up. Merge with offsets auto or dense."
            )
        return dense
    if spec.offset_dtype is not None and not spec.offset_rank:
        if form == FACTORED:
            raise QALoraError(
                f"{spec.name} has offsets in the base that are not factored, so neither is their sum with the "
                "adapter's. Merge with offsets auto or dense."
            )
        return dense
    smaller = offset_bits(factored) < offset_bits(dense)
    return factored if form == FACTORED or (form == AUTO and smaller) else dense


def share_lost(base: QuantizedCheckpoint, adapter: AdapterFolder, dtype: str, form: str = AUTO) -> float:
    """What ``dtype`` would round of all that an adapter adds, in the Euclidean norm, the larger of offsets and changes
    of scales: estimated from a few groups of every linear.

    Below 6e-5 float16 has fewer digits, and changes of scales may be that small. (Factors are brought to the order of
    1, so those are not counted.)
    """
    wanted, lost = [0.0, 0.0], [0.0, 0.0]
    for name in adapter.modules:
        if merged_spec(base.specs[name], adapter.rank(name), dtype, form, adapter.has_scales).offset_rank:
            continue
        a, b = adapter.factors(name)
        rows = np.unique(np.linspace(0, a.shape[1] - 1, _SAMPLED_GROUPS).astype(int))
        products = [adapter.scaling(name) * a.T[rows].astype(np.float64) @ b.T.astype(np.float64)]
        if (factors := adapter.scale_factors(name)) is not None:
            d, c = factors
            scales = base.scales(name)[0][rows]
            products = [products[0] * scales, d[rows] @ c * scales]
        for part, exact in enumerate(products):
            with np.errstate(over="ignore"):
                rounded = exact.astype(np.float32).astype(dtype)
            rounded = np.where(np.isfinite(rounded), rounded, exact)  # too large: refused when it is merged
            weight = a.shape[1] / len(rows)
            wanted[part] += weight * float(np.square(exact).sum())
            lost[part] += weight * float(np.square(exact - rounded).sum())
    return max((one / all_of_it if all_of_it else 0.0) for one, all_of_it in zip(lost, wanted, strict=True)) ** 0.5


def added_bytes(spec: GroupwiseSpec) -> int:
    """What offsets and changes of scales of one linear take on disk."""
    return (offset_bits(spec) + dtype_bits(spec.scales_delta_dtype) * spec.groups * spec.out_features) // 8


def added(
    base: QuantizedCheckpoint, adapter: AdapterFolder, specs: dict[str, GroupwiseSpec], ahead_bytes: int
) -> Iterator[Added]:
    """What is stored of every adapted linear, in order, computed ahead of who takes it, by ``ahead_bytes`` at most.

    Args:
        specs: from :func:`merged_specs`.
    """
    parts = (_offsets_in_steps, _scales_delta) if adapter.has_scales else (_offsets,)
    tasks = [(part, name) for name in adapter.modules for part in parts]
    begun: deque[Future[Added]] = deque()
    ahead = max(2, ahead_bytes // max(added_bytes(specs[name]) for name in adapter.modules))
    with fold_workers() as workers:
        for task, name in tasks:
            begun.append(workers.submit(task, base, adapter, specs[name]))
            if len(begun) > ahead:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def _offsets(base: QuantizedCheckpoint, adapter: AdapterFolder, spec: GroupwiseSpec) -> Added:
    name, dtype = spec.name, str(spec.offset_dtype)
    lora_a, lora_b = adapter.factors(name)
    scaling, before = adapter.scaling(name), base.offsets(name)
    wanted = squared_norm(lora_a, lora_b, scaling)
    if (earlier := base.offset_factors(name)) is not None:  # the base's are an adapter of their own
        lora_a = np.concatenate([scaling * lora_a.astype(np.float64), earlier[0].T])
        lora_b, scaling = np.concatenate([lora_b, earlier[1].T], axis=1, dtype=np.float64), 1.0
    if spec.offset_rank:
        a, b, lost = factor(lora_a, lora_b, scaling, dtype)
        if not all_finite(a):
            raise QALoraError(f"the offsets of {name} exceed what float32 can hold. {_TOO_LARGE['float32']}.")
        return Added(
            {f"{name}.{part}": one for part, one in zip(FACTORS, (a, b), strict=True)}, "offsets", wanted, lost
        )
    offsets, lost = fold(lora_a, lora_b, scaling, dtype, before), 0.0
    if not all_finite(offsets):
        raise QALoraError(f"the offsets of {name} exceed what {dtype} can hold. {_TOO_LARGE[dtype]}.")
    onto = before is not None or earlier is not None
    if dtype == "float16" and (onto or wanted < _SMALL**2 * offsets.size):
        exact = fold(lora_a, lora_b, scaling, "float32", before)
        lost = float(np.square(exact - offsets, dtype=np.float64).sum())
        if not onto:
            wanted = float(np.square(exact, dtype=np.float64).sum())
    return Added({f"{name}.offsets": offsets}, "offsets", wanted, lost)


def _offsets_in_steps(base: QuantizedCheckpoint, adapter: AdapterFolder, spec: GroupwiseSpec) -> Added:
    before = base.offsets(spec.name)
    if (earlier := base.offset_factors(spec.name)) is not None:
        before = earlier[0].astype(np.float64) @ earlier[1].astype(np.float64)
    factors, scaling = adapter.factors(spec.name), adapter.scaling(spec.name)
    return _times_scales(base, f"{spec.name}.offsets", *factors, scaling, str(spec.offset_dtype), before)


def _scales_delta(base: QuantizedCheckpoint, adapter: AdapterFolder, spec: GroupwiseSpec) -> Added:
    factors = adapter.scale_factors(spec.name)
    assert factors is not None  # only adapters with scales come here
    (d, c), (_, before) = factors, base.scales(spec.name)
    return _times_scales(base, f"{spec.name}.scales_delta", d.T, c.T, 1.0, str(spec.scales_delta_dtype), before)


def _times_scales(
    base: QuantizedCheckpoint, name: str, a: np.ndarray, b: np.ndarray, scaling: float, dtype: str,
    before: np.ndarray | None,
) -> Added:  # fmt: skip
    """``before + scales ⊙ scaling·(b·a)ᵀ`` under ``name``; the scales are those that were trained on."""
    module, _, part = name.rpartition(".")
    scales, _ = base.scales(module)
    found = fold(a, b, scaling, dtype, before, scales)
    if not all_finite(found):
        what = "offsets" if part == "offsets" else "changed scales"
        raise QALoraError(f"the {what} of {module} exceed what {dtype} can hold. {_TOO_LARGE[dtype]}.")
    change = fold(a, b, scaling, "float32", None, scales)
    exact = change if before is None else fold(a, b, scaling, "float32", before, scales)
    lost = np.square(exact - found, dtype=np.float64).sum() if dtype == "float16" else 0.0
    wanted = np.square(change, dtype=np.float64).sum()
    return Added({name: found}, part, float(wanted), float(lost))
