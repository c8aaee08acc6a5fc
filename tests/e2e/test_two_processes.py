"""``axolotl train`` as two processes: data parallel and FSDP2 train what one process trains, and the merge follows."""

import pytest
from safetensors.torch import load_file
from support.axolotl_runs import BIN, command
from support.two_processes import FSDP2, assert_halved, assert_same_training, fsdp2, report, train_as_two, trained

pytestmark = pytest.mark.e2e


def test_data_parallel_trains_what_one_process_does(configured, data_parallel):
    one = configured("one", micro_batch_size=2)
    command(BIN / "axolotl", "train", one, "--launcher", "python")
    start = load_file(one.parent.parent / "adapter" / "adapter_model.safetensors")
    assert max((trained(one)[name] - tensor).abs().max() for name, tensor in start.items()) > 1e-2
    assert_same_training(one, data_parallel)
    for rank in (0, 1):
        found = report(data_parallel, rank)
        assert (found["mode"], found["backend"], found["world"]) == ("DISTRIBUTED", "gloo", 2)
        assert found["here"] == found["packed"]
    assert (data_parallel.parent / "out" / "merged" / "offsets.safetensors").is_file()


@pytest.mark.parametrize("kind", FSDP2)
def test_fsdp2_trains_what_data_parallel_does(configured, data_parallel, kind):
    """In two runs, of which the second resumes the first."""
    options = fsdp2(kind)
    train_as_two(configured(kind, max_steps=2, qalora={"merge": False}, **options))
    checkpoint = configured(kind).parent / "out" / "checkpoint-2"
    resumed = configured(
        kind, resume_from_checkpoint=str(checkpoint), qalora={"verify": kind == "full", "verify_tokens": 512}, **options
    )
    output = train_as_two(resumed)
    assert_same_training(resumed, data_parallel)
    assert_halved(resumed)
    merged = resumed.parent / "out" / "merged"
    assert output.count("merged into") == 1
    assert load_file(merged / "offsets.safetensors").keys()
    if kind == "full":
        assert "qalora verify: PASSED" in output
