"""A merged config.json is the base's: what a few tokens do not show is compared."""

import json
import shutil

import pytest
from transformers import AutoConfig

from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.eval import verifying
from qalora_plugin.eval.verifying import verify

SEQUENCES = [list(range(4, 100))]


def test_a_merged_config_that_a_few_tokens_do_not_show(base, adapter, merged, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    changed = {"eos_token_id": 7, "max_position_embeddings": 128, "transformers_version": "5.99", "new_key": True}
    (folder / "config.json").write_text(json.dumps(config | changed))
    (failure,) = verify(base, adapter, folder, SEQUENCES, device="cpu", progress=False).failures
    assert failure == "config.json has max_position_embeddings: 128, the base's 256: merge again"


def test_a_config_that_transformers_saved_anew_is_the_same(base, adapter, merged, tmp_path):
    """It fills in what was null, or left out; another value is another value."""
    folder = shutil.copytree(merged, tmp_path / "anew")
    config = json.loads((folder / "config.json").read_text())
    filled = AutoConfig.from_pretrained(folder).to_dict() | {"quantization_config": config["quantization_config"]}
    source = shutil.copytree(base, tmp_path / "base")
    stated = json.loads((source / "config.json").read_text()) | {"head_dim": None, "num_key_value_heads": None}
    kept = json.loads((base / "config.json").read_text())
    heads = {"num_key_value_heads": filled["num_attention_heads"]}
    for changes, passes in ((heads, True), (heads | {"max_position_embeddings": 7}, False)):
        (source / "config.json").write_text(json.dumps(stated))
        (folder / "config.json").write_text(json.dumps(filled | changes))
        found = verifying._config_differences(Checkpoint.open(source), Checkpoint.open(folder))
        assert (found == ()) == passes, found
    assert found == (f"max_position_embeddings: 7, the base's {kept['max_position_embeddings']}",)


def _dynamic(factor):
    return {"rope_scaling": {"rope_type": "dynamic", "factor": factor}}


HIDDEN = {  # what the base's config has → the merge's
    "another factor": (_dynamic(2.0), _dynamic(8.0)),
    "dropped": ({"max_position_embeddings": 96}, {"max_position_embeddings": None}),
    "added": ({}, _dynamic(2.0)),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_values_inside_of_others_and_those_that_one_lacks(base, merged, tmp_path, case):
    folders = []
    for source, name, changes in zip((base, merged), ("base", "merged"), HIDDEN[case], strict=True):
        folders.append(shutil.copytree(source, tmp_path / name))
        config = json.loads((source / "config.json").read_text()) | changes
        stated = {key: value for key, value in config.items() if value is not None}
        (folders[-1] / "config.json").write_text(json.dumps(stated))
    assert verifying._config_differences(*map(Checkpoint.open, folders))
    assert not verifying._config_differences(Checkpoint.open(base), Checkpoint.open(merged))


def test_the_parts_of_a_model_of_several(base, merged, tmp_path):
    """Of a class that transformers does not know: as they are written."""
    folders = []
    for source, name, window in ((base, "base", 1024), (merged, "merged", 512)):
        folders.append(shutil.copytree(source, tmp_path / name))
        config = json.loads((source / "config.json").read_text())
        text = {"sliding_window": window, "layers": 2, "dtype": name, "eos_token_id": window}
        changed = config | {"model_type": "of_its_own", "text_config": text}
        (folders[-1] / "config.json").write_text(json.dumps(changed))
    found = verifying._config_differences(*map(Checkpoint.open, folders))
    assert found == ("text_config.sliding_window: 512, the base's 1024",)
