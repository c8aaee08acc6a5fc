"""What a merge adds to a linear, ``α/R·(B·A)ᵀ``, as it is stored. In numpy, on all cores: torch takes longer to import
than many a merge takes.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from threadpoolctl import threadpool_limits

_BLOCK = 1 << 20  # offsets; what is in float64 at once
_SCALES = 2.0 ** (np.arange(8) / 8)  # that a row of a factor is tried at
_MOST_THREADS = 8


@contextmanager
def fold_workers() -> Iterator[Executor]:
    """Threads to call :func:`fold` in, one a core."""
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        yield pool


def fold(
    lora_a: np.ndarray,
    lora_b: np.ndarray,
    scaling: float,
    dtype: str,
    base: np.ndarray | None = None,
    factor: np.ndarray | None = None,
) -> np.ndarray:
    """``base + factor ⊙ scaling·(B·A)ᵀ``, computed in float64; what exceeds the dtype becomes infinite.

    Args:
        lora_a: ``[R, G]``. lora_b: ``[N, R]``. dtype: ``"float16"`` or ``"float32"``.
        base: ``[G, N]``, what is there already. factor: ``[G, N]``; None: 1.

    Returns:
        ``[G, N]``.
    """
    a, b = scaling * lora_a.T.astype(np.float64), np.ascontiguousarray(lora_b.T, np.float64)
    offsets = np.empty((len(a), b.shape[1]), dtype)
    rows = max(1, _BLOCK // b.shape[1])
    for start in range(0, len(a), rows):
        block = slice(start, start + rows)
        before, times = (None if tensor is None else tensor[block] for tensor in (base, factor))
        _multiply(a[block], b, before, times, offsets[block])
    return offsets


def factor(lora_a: np.ndarray, lora_b: np.ndarray, scaling: float, dtype: str) -> tuple[np.ndarray, np.ndarray, float]:
    """``scaling·(B·A)ᵀ`` as a product of two factors that may be rounded: ``a·b``.

    The columns of a are orthogonal (QR), so that in the Euclidean norm a rounded b errs by what it was rounded by:
    like offsets that are rounded one by one, whatever cancels in ``B·A``. Each row of b is brought to the order of 1,
    where float16 has all its digits, a's column to the inverse; of eight such scales the one that rounds it least.

    Args:
        lora_a: ``[R, G]``. lora_b: ``[N, R]``. dtype: of b, ``"float16"`` or ``"float32"``.

    Returns:
        a ``[G, r]`` in float32, b ``[r, N]``, r = min(R, G), and ‖a·b − scaling·(B·A)ᵀ‖² but for a's own rounding.
    """
    q, left = np.linalg.qr(scaling * lora_a.T.astype(np.float64))
    exact = left @ lora_b.T.astype(np.float64)
    octave = np.ldexp(1.0, 1 - np.frexp(np.abs(exact).max(axis=1))[1])
    scales, b = octave.copy(), np.empty(exact.shape, dtype)
    lost = np.full(len(exact), np.inf)
    for tried in _SCALES:
        rounded = (exact * (tried * octave)[:, None]).astype(np.float32).astype(dtype)
        error = np.square(rounded / (tried * octave)[:, None] - exact).sum(axis=1)
        better = error < lost
        b[better], scales[better], lost[better] = rounded[better], (tried * octave)[better], error[better]
    with np.errstate(over="ignore"):
        return (q / scales).astype(np.float32), b, float(lost.sum())


def squared_norm(lora_a: np.ndarray, lora_b: np.ndarray, scaling: float) -> float:
    """``‖scaling·(B·A)ᵀ‖²`` (Frobenius) of A ``[R, G]`` and B ``[N, R]``, by products of R×R: ``tr(BᵀB·AAᵀ)``."""
    a, b = lora_a.astype(np.float64), lora_b.astype(np.float64)
    return scaling**2 * float(((a @ a.T) * (b.T @ b)).sum())


def _multiply(
    a: np.ndarray, b: np.ndarray, base: np.ndarray | None, factor: np.ndarray | None, out: np.ndarray
) -> None:
    """``base + factor ⊙ a·b`` in float64, rounded to float32, then to ``out``'s dtype (as torch rounds float64 to
    float16)."""
    product = a @ b
    if factor is not None:
        product *= factor
    if base is not None:
        product += base
    with np.errstate(over="ignore"):
        out[...] = product.astype(np.float32)
