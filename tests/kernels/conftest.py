import pytest
import torch
from support.steps import with_random_b

from qalora_plugin import add_adapter, load_base


@pytest.fixture
def model(base):
    torch.manual_seed(0)
    return with_random_b(add_adapter(load_base(base, dtype=torch.float32), r=4, target_modules="all-linear")).train()
