"""Whatever is imported first works in vLLM's environment, too."""

from support.import_orders import failures, failures_after, modules, public_names

import qalora_plugin
import vllm_ext

TRAINING = {
    "QALoraPlugin": "axolotl", "QALoraMergeCallback": "peft",
    "QALoraConfig": "peft", "add_adapter": "peft", "load_adapter": "peft", "calibrate": "peft",
}  # fmt: skip


def test_every_public_name_can_be_imported_first():
    assert failures(public_names(but=tuple(TRAINING))) == {}


def test_names_of_the_training_environment_say_what_is_missing():
    found = failures([f"from qalora_plugin import {name}" for name in TRAINING])
    for (name, package), error in zip(TRAINING.items(), found.values(), strict=True):
        assert f"qalora_plugin.{name} needs {package}, which is not installed here" in error


def test_every_module_can_be_imported_first():
    packages = ("torch", "transformers.quantizers.auto", "vllm.model_executor.layers.linear")
    found = failures_after(packages, modules(qalora_plugin) + modules(vllm_ext))
    training = ("integrations.axolotl", "integrations.peft", "integrations.trainer", "methods.calibrating")
    rooms = tuple(f"import qalora_plugin.{room}" for room in training)
    assert {statement: error for statement, error in found.items() if not statement.startswith(rooms)} == {}
    assert set(found.values()) <= {f"ModuleNotFoundError: No module named '{name}'" for name in TRAINING.values()}
