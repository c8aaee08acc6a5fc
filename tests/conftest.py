"""Shared fixtures: small bases, an adapter trained a few steps, its merge."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # run Triton's kernels without a GPU; read when Triton is first imported
from support.fabricate import make_base


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """Asymmetric, v1 zeros, g 32."""
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory) -> Path:
    """An adapter with random (not zero) A and B on every linear of ``base``."""
    from support.fabricate import make_adapter

    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="session")
def merged(base, adapter, tmp_path_factory) -> Path:
    from qalora_plugin.conversion.merging import merge

    return merge(base, adapter, tmp_path_factory.mktemp("merged") / "model", progress=False).folder
