"""Whatever is imported first works in vLLM's environment, too."""

from support.import_orders import failures, modules, public_names

import qalora_plugin
import vllm_ext

TRAINING = {"QALoraPlugin": "axolotl", "QALoraConfig": "peft", "add_adapter": "peft", "load_adapter": "peft"}


def test_every_public_name_can_be_imported_first():
    assert failures(public_names(but=tuple(TRAINING))) == {}


def test_names_of_the_training_environment_say_what_is_missing():
    found = failures([f"from qalora_plugin import {name}" for name in TRAINING])
    for (name, package), error in zip(TRAINING.items(), found.values(), strict=True):
        assert f"qalora_plugin.{name} needs {package}, which is not installed here" in error


def test_every_module_can_be_imported_first():
    training = tuple(f"qalora_plugin.{name}" for name in ("adapter", "peft_conversion", "plugin", "preflight", "tuner"))
    assert failures(modules(qalora_plugin, but=training) + modules(vllm_ext)) == {}
