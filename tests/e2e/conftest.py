"""What the tests of two processes compare with."""

from pathlib import Path

import pytest
from support.two_processes import same_training, train_as_two


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    return same_training(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def data_parallel(configured) -> Path:
    """The config of a run that two processes trained, data parallel."""
    config = configured("ddp")
    train_as_two(config)
    return config
