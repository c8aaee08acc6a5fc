"""Distillation through Axolotl's own ``kd`` plugin: the adapter learns a teacher's distribution, and merges."""

import json
import math

import pytest
import torch
from support.axolotl_runs import BIN, command, losses, write_config
from support.fabricate import make_base

from qalora_plugin import load_adapter, load_base

pytestmark = pytest.mark.e2e

TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
TAUGHT, SHARES = [5, 6, 7, 8], [0.4, 0.3, 0.2, 0.1]
ANSWER = "the square of it, as ever"


def teacher_rows(path):
    """Questions and answers, and what a teacher finds likely at the answers' tokens: always the same four."""
    rows = []
    for i in range(48):
        messages = [{"role": "user", "content": f"say {i:02d}"}, {"role": "assistant", "content": ANSWER}]
        taught = {"target_token_ids": [TAUGHT] * len(ANSWER), "logprobs": [[math.log(s) for s in SHARES]] * len(ANSWER)}
        rows.append({"messages": messages, **taught})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def taught_share(model):
    """What a model gives to the teacher's tokens, on average over an answer."""
    with torch.no_grad():
        logits = model(torch.arange(20, 60)[None]).logits[0, -20:]
    return logits.softmax(-1)[:, TAUGHT].sum(-1).mean().item()


@pytest.mark.parametrize("scales", [False, True])
def test_distils_a_teacher(tmp_path, scales):
    base = make_base(tmp_path / "base")
    teacher_rows(tmp_path / "teacher.jsonl")
    data = {
        "path": str(tmp_path / "teacher.jsonl"), "ds_type": "json", "type": "axolotl.integrations.kd.chat_template",
        "logprobs_field": "logprobs", "roles_to_train": ["assistant"], "train_on_eos": "none",
    }  # fmt: skip
    config = write_config(
        tmp_path, base, plugins=["axolotl.integrations.kd.KDPlugin", "qalora_plugin.QALoraPlugin"], datasets=[data],
        chat_template="jinja", chat_template_jinja=TEMPLATE, kd_trainer=True, kd_ce_alpha=0.1, kd_alpha=0.9,
        kd_temperature=1.0, max_steps=16, learning_rate=0.02, val_set_size=None, eval_steps=None, save_steps=16,
        qalora={"scales": scales, "verify_tokens": 256},
    )  # fmt: skip
    output = command(BIN / "axolotl", "train", config, "--launcher", "python")
    assert "qalora verify: PASSED" in output
    found = losses(tmp_path / "out", "loss")
    assert found[-1] < 0.8 * found[0]
    model = load_base(base, dtype=torch.float32)
    before = taught_share(model)
    assert taught_share(load_adapter(model, tmp_path / "out")) > 2 * before
