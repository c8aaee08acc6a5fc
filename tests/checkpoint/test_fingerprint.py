"""Same fingerprint, same weights, read in the same way; and what is remembered is never trusted too long."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fabricate import make_adapter, make_base

from qalora_plugin import load_base
from qalora_plugin.checkpoint import fingerprint as module
from qalora_plugin.checkpoint.fingerprint import fingerprint, identity, keep_remembering
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.conversion.lora import export_lora
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.integrations.peft.loading import load_adapter


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qalora" / "digests"


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def of(folder, like=None) -> str:
    checkpoint = Checkpoint.open(folder)
    return fingerprint(checkpoint, checkpoint.quantization.get("checkpoint_format", "gptq"), like)


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_sharding_does_not_matter(base, copy, tmp_path):
    assert of(base).startswith("blake3:")
    assert of(base) == of(copy) == of(make_base(tmp_path / "s", shards=2))
    assert of(make_base(tmp_path / "other", seed=1)) != of(base)


def test_every_byte_of_every_tensor(tmp_path):
    """Beyond 256 KiB, too, where 64 blocks used to be looked at, and beyond what is read at a time."""
    (tmp_path / "config.json").write_text("{}")
    big = torch.zeros(3 << 20, dtype=torch.uint8)

    def value(at=None):
        tensor = big.clone()
        if at is not None:
            tensor[at] = 1
        save_file({"x": tensor}, tmp_path / "model.safetensors")
        return of(tmp_path)

    places = [None, 0, 5000, (1 << 20) - 1, 1 << 20, (2 << 20) + 77, len(big) - 1]
    assert len({value(at) for at in places}) == len(places)


def test_names_dtypes_and_shapes(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    values = torch.arange(16, dtype=torch.int32)

    def value(**tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        return of(tmp_path)

    kinds = {"a": values}, {"b": values}, {"a": values.view(4, 4)}, {"a": values.view(torch.float32)}, {"a": values[:8]}
    assert len({value(**tensors) for tensors in kinds} | {value(a=values[:8], b=values[8:])}) == len(kinds) + 1


CHANGES = {
    "one row of a large tensor": lambda f: edit_tensors(f, lambda t: t["model.embed_tokens.weight"][50].add_(1)),
    "a scale": lambda f: edit_tensors(f, lambda t: t["model.layers.1.mlp.up_proj.scales"][0, :1].mul_(2)),
    "a norm": lambda f: edit_tensors(f, lambda t: t["model.norm.weight"][:1].add_(1)),
    "the reading of zero-points": lambda f: edit_config(f, checkpoint_format="gptq_v2"),
    "the reading, by the older key": lambda f: edit_config(f, checkpoint_format=None, format="gptq_v2"),
    "a stray tensor": lambda f: edit_tensors(f, lambda t: t.update(stray=torch.ones(2))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_changed_after_training_is_refused_everywhere(base, adapter, copy, tmp_path, change):
    CHANGES[change](copy)
    for use in (
        lambda: merge(copy, adapter, tmp_path / "out", progress=False),
        lambda: export_lora(adapter, tmp_path / "out", copy),
        lambda: load_adapter(load_base(copy), adapter),
    ):
        with pytest.raises(QALoraError, match="was trained on another base"):
            use()


def test_how_the_config_spells_the_same_reading_does_not_matter(base, adapter, copy, tmp_path):
    edit_config(copy, checkpoint_format=None, format="gptq", sym=True)  # symmetry is read off the zeros
    merge(copy, adapter, tmp_path / "out", progress=False)


def test_stray_offsets_in_a_base_are_refused(adapter, copy, tmp_path):
    name = "model.layers.0.mlp.up_proj.offsets"
    edit_tensors(copy, lambda t: t.update({name: torch.ones_like(t[name.replace("offsets", "scales")])}))
    for use in (load_base, lambda folder: merge(folder, adapter, tmp_path / "out", progress=False)):
        with pytest.raises(QALoraError, match=f"GPTQ checkpoint by its config, but holds the merged {name}"):
            use(copy)


def test_adapters_made_before(base, tmp_path):
    """They record a sampled sha256, and stay loadable and mergeable on their base alone."""
    old = make_adapter(base, tmp_path / "old")
    config = json.loads((old / "adapter_config.json").read_text())
    config["qalora"]["base_fingerprint"] = of(base, like="sha256:")
    assert config["qalora"]["base_fingerprint"].startswith("sha256:")
    (old / "adapter_config.json").write_text(json.dumps(config))
    merge(base, old, tmp_path / "out", progress=False)
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    assert merged["quantization_config"]["base_fingerprint"] == of(base)
    load_adapter(load_base(base), old)
    other = make_base(tmp_path / "other", seed=3)
    with pytest.raises(QALoraError, match="was trained on another base"):
        merge(other, old, tmp_path / "out2", progress=False)
    with pytest.raises(QALoraError, match="was trained on another base"):
        load_adapter(load_base(other), old)


def test_what_the_sampled_kind_was(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {"x": torch.arange(1 << 18, dtype=torch.int32), "y.offsets": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    assert of(tmp_path, "sha256:") == "sha256:a5f1425ee8869bd20ee3c648e9c777802906f8cd6a724f8c83eb42d73187b9f7"


def settled(folder):
    time.sleep(2 * module._TICK)
    return of(folder)


def test_a_second_time_nothing_is_read(copy, cache, monkeypatch):
    first = settled(copy)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(module, "_digest", None)
    assert of(copy) == first


def test_a_change_is_seen_though_size_and_times_are_restored(copy, cache):
    first, path = settled(copy), copy / "model.safetensors"
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert identity(path)[:4] == (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns)
    assert of(copy) != first


def test_what_could_still_change_unseen_is_not_remembered(copy, cache, monkeypatch):
    monkeypatch.setattr(module, "_TICK", 60)
    os.utime(copy / "model.safetensors")
    of(copy)
    assert not list(cache.iterdir())


def test_a_merge_by_links_keeps_what_is_remembered(base, adapter, copy, tmp_path, monkeypatch):
    settled(copy)
    path = copy / "model.safetensors"
    before = identity(path)
    os.link(path, tmp_path / "link")
    assert identity(path) != before
    time.sleep(2 * module._TICK)
    keep_remembering(path, before)
    monkeypatch.setattr(module, "_digest", None)
    assert of(copy) == of(copy)
    os.utime(path)
    keep_remembering(path, before)
    with pytest.raises(TypeError):  # it would be read
        of(copy)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"identity": 1}', '{"tensors": {}}'])
def test_a_damaged_cache_costs_time_only(base, copy, cache, content):
    first = settled(copy)
    (entry,) = cache.iterdir()
    entry.write_text(content)
    assert of(copy) == first


@pytest.mark.parametrize("trap", ["open", "link", "file"])
def test_a_cache_that_others_could_write_is_not_used(copy, cache, tmp_path, caplog, trap):
    first = of(copy)
    shutil.rmtree(cache.parent)
    cache.parent.mkdir(mode=0o700)
    if trap == "open":
        cache.mkdir()
        cache.chmod(0o777)
    elif trap == "link":
        (tmp_path / "elsewhere").mkdir()
        cache.symlink_to(tmp_path / "elsewhere")
    else:
        cache.touch()
    assert settled(copy) == first
    assert "nothing is cached" in caplog.text
    assert trap == "file" or not list(cache.iterdir())


def test_a_merge_reads_the_base_through_once(base, adapter, tmp_path, monkeypatch):
    """Also where nothing can be remembered."""
    digest, read = module._digest, []
    monkeypatch.setattr(module, "private_folder", lambda name: None)
    monkeypatch.setattr(module, "_digest", lambda path, info: read.append(info) or digest(path, info))
    merge(base, adapter, tmp_path / "out", progress=False)
    assert len(read) == len(set(read)) == len(Checkpoint.open(base).tensors)
