"""`qalora quantize` that a batch system ends: what GPTQModel has written by then is gone, too."""

import signal
import subprocess
import sys

from support.fabricate import make_base

CODE = """
import os, signal, sys, time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from qalora_plugin.methods import quantizing

class Quantized:
    model = SimpleNamespace(dtype=None)
    def quantize(self, rows, **_):
        done = Path(self.config["offload_to_disk_path"])
        done.mkdir(parents=True)
        (done / "layer").write_text("half of the model")
        print(done, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

def load(folder, config):
    Quantized.config = config
    return Quantized()

family = SimpleNamespace(module_tree=None)
models = SimpleNamespace(check_and_get_model_definition=lambda *_, **__: family)
fake = ModuleType("gptqmodel")
fake.GPTQModel, fake.QuantizeConfig, fake.GPTAQConfig = SimpleNamespace(load=load), dict, dict
sys.modules |= {"gptqmodel": fake, "gptqmodel.models.auto": models}
quantizing.find_spec = lambda name: name
quantizing.quantize(*sys.argv[1:], samples=16, length=512)
"""


def test_nothing_is_left(tmp_path, monkeypatch):
    make_base(tmp_path / "base", twin=tmp_path / "dense")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    command = [sys.executable, "-c", CODE, tmp_path / "dense", tmp_path / "out", __file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout.strip().startswith(str(tmp_path / "tmp"))
    assert not list((tmp_path / "tmp").iterdir())
    assert not (tmp_path / "out").exists()
