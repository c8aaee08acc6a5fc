"""Tools that know nothing of this project load merged checkpoints: each in a fresh process that never imports it.

That takes an installed package (its entry point), as ``make`` installs it; a folder on the path is not enough.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from support.fabricate import make_tokenizer
from transformers import AutoModelForCausalLM

from qalora_plugin.formats.qalora import NEEDS_QALORA
from qalora_plugin.registration import register_with_transformers

TEXT = "the quick brown fox jumps over the lazy dog, again and again"


@pytest.fixture(scope="module")
def model(merged):
    return AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()


def run(*command, code=0, **environment) -> subprocess.CompletedProcess:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=os.environ | offline | environment
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


PIPELINE = """
import sys
from transformers import pipeline
generator = pipeline("text-generation", model=sys.argv[1], device="cpu", dtype="float32")
print(repr(generator(sys.argv[2], max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"]))
"""


def test_pipeline(merged, model):
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    done = run(sys.executable, "-c", PIPELINE, merged, TEXT)
    assert done.stdout.splitlines()[-1] == repr(tokenizer.decode(expected, skip_special_tokens=True))


def test_lm_eval(merged, model, tmp_path):
    """``--model hf`` on a local task: its byte perplexity is that of the logits."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    (tmp_path / "local.yaml").write_text(
        f"""
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
    )
    run(
        Path(sys.executable).parent / "lm_eval", "--model", "hf", "--model_args", f"pretrained={merged},dtype=float32",
        "--tasks", "local", "--include_path", tmp_path, "--device", "cpu", "--output_path", tmp_path / "out.json",
        HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    (report,) = tmp_path.glob("out*.json")
    found = json.loads(report.read_text())["results"]["local"]["byte_perplexity,none"]
    ids = make_tokenizer()(TEXT).input_ids
    with torch.no_grad():
        log_p = model(torch.tensor([[1, *ids]])).logits[0, :-1].log_softmax(-1)  # after BOS, as lm_eval begins
    expected = torch.exp(-log_p.gather(1, torch.tensor(ids)[:, None]).sum() / len(TEXT.encode()))
    assert found == pytest.approx(expected.item(), rel=1e-4)


TRL = """
import sys, torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import create_model_from_path

merged, out = sys.argv[1:]
policy = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=128))
pairs = {"prompt": ["say "] * 4, "chosen": ["yes yes"] * 4, "rejected": ["no no no"] * 4}
trainer = DPOTrainer(
    policy, ref_model=create_model_from_path(merged, device_map=None, dtype="float32"),
    args=DPOConfig(out, max_steps=1, report_to=[], use_cpu=True, bf16=False),
    train_dataset=Dataset.from_dict(pairs), processing_class=AutoTokenizer.from_pretrained(merged),
)
trainer.train()
torch.save(trainer.ref_model(torch.arange(4, 40)[None]).logits, out + "/logits.pt")
"""


def test_trl_with_a_merged_reference(merged, model, tmp_path):
    run(sys.executable, "-c", TRL, merged, tmp_path)
    with torch.no_grad():
        expected = model(torch.arange(4, 40)[None]).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-4)


LOAD = "import sys; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"


@pytest.mark.parametrize("command", [("-c", LOAD), ("-c", PIPELINE)], ids=["from_pretrained", "pipeline"])
def test_without_the_package_it_stops_and_says_why(merged, command):
    """As where it is not installed: torch is told to load no extensions."""
    done = run(sys.executable, *command, merged, TEXT, code=1, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert f"No such file or directory: {merged / NEEDS_QALORA}" in done.stderr


def test_importing_the_package_is_still_enough(merged):
    done = run(sys.executable, "-c", f"import qalora_plugin; {LOAD}", merged, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "MISSING" not in done.stderr


def test_torch_finds_the_hook():
    (point,) = [point for point in entry_points(group="torch.backends") if point.name == "qalora"]
    assert point.load() is register_with_transformers


def test_what_is_added_to_importing_torch():
    """Three small modules and an empty package, and none of torch's, transformers' or numpy's size."""
    code = (
        "import sys, importlib.metadata; before = set(sys.modules); import qalora_plugin.registration; "
        "print(sorted(set(sys.modules) - before))"
    )
    added = eval(run(sys.executable, "-c", code).stdout)
    ours = [name for name in added if name.startswith("qalora_plugin")]
    assert ours == ["qalora_plugin", "qalora_plugin.core", "qalora_plugin.core.errors", "qalora_plugin.registration"]
    assert not {"torch", "numpy", "transformers", "peft", "pydantic", "rich"} & set(added)
