"""Hub ids, from a Hub cache laid out as huggingface_hub lays it out: links to blobs, a ref a revision. No network."""

import hashlib
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.fabricate import make_adapter, make_base

from qalora_plugin import add_adapter, load_base
from qalora_plugin.checkpoint.adapter_folder import AdapterFolder
from qalora_plugin.checkpoint.folder import Checkpoint
from qalora_plugin.checkpoint.hub import is_local, require_use_of_revision, resolve
from qalora_plugin.conversion.merging import merge
from qalora_plugin.core.errors import QALoraError
from qalora_plugin.formats.opened import QuantizedCheckpoint
from qalora_plugin.integrations.axolotl.preflight import check_base


def add_to_cache(cache: Path, name: str, ref: str, folder: Path) -> None:
    repo = cache / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(ref.encode()).hexdigest()
    snapshot = repo / "snapshots" / commit
    for part in (snapshot, repo / "refs", repo / "blobs"):
        part.mkdir(parents=True, exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    for path in folder.iterdir():
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        if not blob.exists():
            shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``team/base`` with two revisions that differ."""
    cache = tmp_path / "hub"
    add_to_cache(cache, "team/base", "main", make_base(tmp_path / "one", shards=2))
    add_to_cache(cache, "team/base", "v2", make_base(tmp_path / "two", seed=1))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(cache))
    return tmp_path


def test_id_and_revision(hub):
    for revision, local in ((None, "one"), ("v2", "two")):
        expected = QuantizedCheckpoint.open(hub / local).fingerprint()
        assert QuantizedCheckpoint.open("team/base", revision).fingerprint() == expected
        assert load_base("team/base", revision=revision).hf_quantizer.base_fingerprint() == expected
    check_base("team/base", "v2")


def test_merge_links_the_blob_not_the_link(hub):
    adapter = make_adapter(hub / "one", hub / "adapter")
    out = merge("team/base", adapter, hub / "out", progress=False).folder
    shard = out / "model-00001-of-00002.safetensors"
    assert not shard.is_symlink()
    assert shard.stat().st_ino == (resolve("team/base") / shard.name).resolve().stat().st_ino
    with pytest.raises(QALoraError, match="trained on another base"):
        merge("team/base", adapter, hub / "out2", revision="v2", progress=False)


def test_the_id_is_what_is_written_down(hub):
    """In adapter and cards: a folder of this machine's cache would mean nothing elsewhere, and the Hub refuses it."""
    model = load_base("team/base")
    assert model.name_or_path == model.config.name_or_path == "team/base"
    add_adapter(model, r=4, target_modules="all-linear").save_pretrained(hub / "adapter")
    assert AdapterFolder.open(hub / "adapter").config["base_model_name_or_path"] == "team/base"
    out = merge("team/base", hub / "adapter", hub / "out", progress=False).folder
    for folder in (hub / "adapter", out):
        assert ModelCard.load(folder / "README.md").data.base_model == "team/base"
    local = merge(resolve("team/base"), hub / "adapter", hub / "local", progress=False).folder
    assert ModelCard.load(local / "README.md").data.base_model is None


def test_unknown_id_or_revision(hub):
    with pytest.raises(QALoraError, match="fetching it from the Hub failed"):
        Checkpoint.open("team/other")
    with pytest.raises(QALoraError, match="fetching it from the Hub failed"):
        Checkpoint.open("team/base", "v3")
    with pytest.raises(QALoraError, match="cannot be had from the Hub"):
        check_base("team/other")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_missing_folder_is_named_as_it_was_written(hub, kind):
    with pytest.raises(QALoraError, match=r"^'nope' is no local folder, and fetching it from the Hub failed"):
        resolve(kind("nope"))


def test_an_empty_name_is_not_the_working_directory(hub, monkeypatch):
    monkeypatch.chdir(hub / "one")
    assert not is_local("")
    assert is_local(".")
    with pytest.raises(QALoraError, match="the name of a model is empty"):
        Checkpoint.open("")


def test_a_revision_of_folders_alone(hub):
    require_use_of_revision("v2", [hub / "one", "team/base"])
    require_use_of_revision(None, [hub / "one"])
    with pytest.raises(QALoraError, match="--revision v2 is of a Hub id, but every model is a folder here"):
        require_use_of_revision("v2", [hub / "one", str(hub / "two")])


def test_load_base_looks_where_it_is_told(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub / "empty"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(hub / "empty"))
    assert load_base("team/base", cache_dir=hub / "hub").name_or_path == "team/base"
    with pytest.raises(QALoraError, match="fetching it from the Hub failed"):
        load_base("team/base")
