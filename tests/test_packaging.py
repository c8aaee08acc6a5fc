"""The sdist and the wheel hold what they should, and an installed wheel is the whole program."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

import pytest

import qalora_plugin

ROOT = Path(__file__).parents[1]
OF_THE_REPOSITORY = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")  # of no use in an sdist
PACKAGES = ("qalora_plugin/", "vllm_ext/")
_BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(*command: object, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(what: str, source: Path, out: Path) -> Path:
    return out / run(sys.executable, "-c", _BUILD, what, out, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: what belongs to the project is not known")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def sdist(tracked, tmp_path_factory) -> Path:
    """Built in a copy that also holds what working leaves behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    for litter in ("tests/__pycache__/a.cpython-311.pyc", "qalora_plugin/core/__pycache__/a.pyc", ".venv/bin/python"):
        (source / litter).parent.mkdir(parents=True, exist_ok=True)
        (source / litter).touch()
    return build("build_sdist", source, out)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the unpacked sdist, as pip does."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    return build("build_wheel", next(unpacked.iterdir()), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", "--no-compile", "--target", target, wheel, cwd=target)
    return target


def test_the_sdist_holds_what_git_does(tracked, sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in (member.name for member in archive if member.isfile())}
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("qalora.egg-info/")}
    assert names - made == {name for name in tracked if not name.startswith(OF_THE_REPOSITORY)}


def test_the_wheel_holds_the_packages_and_nothing_else(tracked, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"qalora-{qalora_plugin.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == {n for n in tracked if n.startswith(PACKAGES)}
    assert info + "licenses/LICENSE" in names
    for needed in ("qalora_plugin/py.typed", "vllm_ext/py.typed", "qalora_plugin/kernels/cpu/problem.h"):
        assert needed in names
    assert sum(name.endswith((".cpp", ".h")) for name in names) >= 5


def test_an_installed_wheel_is_the_whole_program(installed, tmp_path):
    (found,) = distributions(path=[str(installed)])
    assert found.version == qalora_plugin.__version__
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert {"train", "peft", "serve", "quantize", "gguf", "mlx"} <= set(found.metadata.get_all("Provides-Extra"))
    assert set(found.entry_points) >= {
        EntryPoint("qalora", "qalora_plugin.commands.cli:app", "console_scripts"),
        EntryPoint("qalora", "qalora_plugin.commands.cli:command", "axolotl.cli_commands"),
        EntryPoint("qalora", "vllm_ext:register", "vllm.general_plugins"),
        EntryPoint("qalora", "qalora_plugin.registration:register_with_transformers", "torch.backends"),
    }
    where = run(sys.executable, "-c", "import qalora_plugin; print(qalora_plugin.__file__)", cwd=tmp_path,
                PYTHONPATH=str(installed))  # fmt: skip
    assert Path(where.strip()).is_relative_to(installed)
    script = (installed / "bin" / "qalora", "--help")
    assert "merge" in run(sys.executable, *script, cwd=tmp_path, PYTHONPATH=str(installed))
