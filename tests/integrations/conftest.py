"""Bases whose experts are quantized; who changes one copies it first."""

import pytest
from families.architectures import build
from families.bases import make_base_of


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory):
    """With the older names on disk, ``block_sparse_moe.experts.E.w1``."""
    return make_base_of(build("mixtral"), tmp_path_factory.mktemp("mixtral"), quantize_experts=True).folder


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    return make_base_of(build("qwen3_moe"), tmp_path_factory.mktemp("qwen"), quantize_experts=True).folder


@pytest.fixture(scope="session")
def gpt_oss(tmp_path_factory):
    """With biases and a gate of its own, whose columns alternate with those of up."""
    return make_base_of(build("gpt_oss"), tmp_path_factory.mktemp("gpt_oss"), quantize_experts=True).folder
