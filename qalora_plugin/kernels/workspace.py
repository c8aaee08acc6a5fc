"""One scratch buffer for dense weights, shared by all layers: none is ever kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch import Tensor

_Place = tuple[torch.device, torch.dtype, int]  # the last: which CUDA stream, 0 elsewhere

_scratch: dict[_Place, Tensor] = {}
_views: dict[tuple[_Place, int, int], Tensor] = {}
_in_use = RLock()


@contextmanager
def scratch(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """A ``[rows, cols]`` view of the one scratch buffer per device, dtype and CUDA stream.

    It is the caller's inside the ``with`` block: other threads wait. (On CUDA it is enough to launch inside what reads
    the buffer, since a stream keeps the order.)
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _in_use:
        yield _view((device, dtype, stream), rows, cols)


def _view(place: _Place, rows: int, cols: int) -> Tensor:
    view = _views.get((place, rows, cols))
    if view is not None:
        return view
    device, dtype, _ = place
    size = rows * cols
    with torch.inference_mode(False):  # a buffer born in inference mode could not be written outside it
        if place not in _scratch or _scratch[place].numel() < size:
            for old in [known for known in _views if known[0] == place]:
                del _views[old]
            _scratch[place] = torch.empty(size, dtype=dtype, device=device)
        view = _views[place, rows, cols] = _scratch[place][:size].view(rows, cols)
    return view
