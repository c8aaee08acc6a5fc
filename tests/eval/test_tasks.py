"""lm_eval on a loaded model: a base, and base + adapter, which its own --model hf could not load."""

import json
import math

import pytest
import torch
from support.fabricate import make_tokenizer

from qalora_plugin.core.errors import QALoraError
from qalora_plugin.eval import tasks
from qalora_plugin.eval.evaluate import mean_loss
from qalora_plugin.eval.examples import Example
from qalora_plugin.eval.models import Subject
from qalora_plugin.eval.tasks import Tasks

TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    task = f"""
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "data.jsonl"}}}, cache_dir: {folder / "cache"}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
"""
    (folder / "local.yaml").write_text(task)
    return Tasks(["local"], folder)


def test_scores_are_those_of_the_logits(local, base, adapter):
    subject = Subject.open(str(base), str(adapter))
    with subject.loaded(torch.float32, "cpu") as model:
        (score,) = local.scores(model, subject.tokenizer)
        loss = mean_loss(model, [Example([1, *make_tokenizer()(TEXT).input_ids])]).loss  # after BOS, as lm_eval begins
    assert (score.task, score.metric) == ("local", "byte_perplexity")
    assert score.value == pytest.approx(math.exp(loss), rel=1e-4)


def test_what_fails_inside_is_one_line(local, base):
    subject = Subject.open(str(base))
    with pytest.raises(QALoraError, match="lm_eval failed on local: ") as error:
        local.scores(None, subject.tokenizer)
    assert "\n" not in str(error.value)


def test_unknown_tasks():
    with pytest.raises(QALoraError, match="lm_eval knows no task 'nonesuch'"):
        Tasks(["nonesuch"])


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(QALoraError, match=r"not installed here: pip install 'qalora\[eval\]'"):
        Tasks(["arc_easy"])


def test_a_folder_of_tasks_that_is_none(tmp_path):
    with pytest.raises(QALoraError, match="is no folder"):
        Tasks(["arc_easy"], tmp_path / "none")
