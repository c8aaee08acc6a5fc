"""The house: rooms import downwards only, and outside libraries are known where they are integrated and nowhere else.

Imports are read from the sources, those inside functions and under ``TYPE_CHECKING`` too.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qalora_plugin", "vllm_ext")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# From the ground up. A room sees those on lower floors, and itself.
FLOORS = (
    {"core"},
    {"kernels", "checkpoint"},
    {"layers", "formats"},
    {"conversion"},
    {"integrations.transformers"},
    {"integrations.peft"},
    {"eval"},
    {"methods"},
    {"integrations.trainer", "integrations.axolotl", "commands"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Upwards after all, and why.
UPWARDS = {
    ("conversion.card", "eval.verifying"): "a type alone: the card prints a report that it is handed",
    ("integrations.transformers.loading", "integrations.peft.tuner"): "where PEFT is, get_peft_model and TRL must know "
    "the model's layers though nobody imported our PEFT side: whoever loads a base has it imported",
}
SERVING_MAY_SEE = {"core", "checkpoint", "formats", "kernels"}

# Library → who may import it; torch inside functions is anybody's.
OUTSIDE = {
    "axolotl": ("qalora_plugin.integrations.axolotl",),
    "peft": tuple(f"qalora_plugin.integrations.{room}" for room in ("peft", "axolotl", "trainer")),
    "trl": (),
    "gptqmodel": ("qalora_plugin.methods.quantizing",),
    "lm_eval": ("qalora_plugin.eval.tasks",),
    "matplotlib": ("qalora_plugin.eval.results",),
    "vllm": ("vllm_ext", "qalora_plugin.commands.doctor"),
}  # fmt: skip
# What a merge imports, and what every ``import torch`` does: light itself and all the way down.
LIGHT = ("checkpoint", "formats", "conversion")
HEAVY = {"torch", "transformers", "peft", "axolotl", "vllm", "datasets", "gguf", "mlx"}
LONGEST = 300  # lines of a file


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Every module that a file imports, and whether that happens as soon as the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.If)
        and (not isinstance(node, ast.If) or ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in later) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            for alias in node.names:  # a module of that package, or a name in that module
                inside = f"{node.module}.{alias.name}"
                found.append((inside if inside in MODULES else str(node.module), id(node) not in later))
    return found


def room(module: str) -> str | None:
    """Name of a module's room; None for what stands before the rooms (``qalora_plugin`` itself, registration)."""
    inside = module.removeprefix("qalora_plugin.")
    return max((name for name in FLOOR if f"{inside}.".startswith(f"{name}.")), key=len, default=None)


def test_every_module_is_in_a_room():
    outside = {name for name in MODULES if name.startswith("qalora_plugin.") and room(name) is None}
    assert outside - {"qalora_plugin.integrations"} == {"qalora_plugin.registration"}


def test_rooms_import_downwards_only():
    upwards = set()
    for path in FILES:
        here = module_name(path)
        for there, _ in imports(path):
            below, above = room(there), room(here)
            if not (here.startswith("qalora_plugin.") and there.startswith("qalora_plugin.") and below and above):
                continue
            if below != above and FLOOR[below] >= FLOOR[above]:
                upwards.add((here.removeprefix("qalora_plugin."), there.removeprefix("qalora_plugin.")))
    assert upwards == set(UPWARDS), "correct what is new here, and strike out what is gone"


def test_no_cycles_between_modules():
    graph = {module_name(path): {there for there, at_once in imports(path) if at_once} & set(MODULES) for path in FILES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a cycle: {' → '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for there in sorted(graph[module]):
                visit(there, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_training_knows_nothing_of_serving_but_what_doctor_reports():
    for path in FILES:
        here = module_name(path)
        if here.startswith("qalora_plugin") and here != "qalora_plugin.commands.doctor":
            assert not [there for there, _ in imports(path) if there.split(".")[0] == "vllm_ext"], here


def test_serving_sees_the_lower_rooms_only():
    for path in FILES:
        if module_name(path).startswith("vllm_ext"):
            seen = {room(there) for there, _ in imports(path) if there.startswith("qalora_plugin")}
            assert seen <= SERVING_MAY_SEE, module_name(path)


@pytest.mark.parametrize("library", OUTSIDE)
def test_who_knows_a_library(library):
    knowing = {module_name(path) for path in FILES for there, _ in imports(path) if there.split(".")[0] == library}
    assert {
        name for name in knowing if not f"{name}.".startswith(tuple(f"{may}." for may in OUTSIDE[library]))
    } == set()


def test_what_must_be_light_imports_nothing_heavy():
    roots = ["qalora_plugin", "qalora_plugin.commands.cli", "vllm_ext", *(m for m in MODULES if room(m) in LIGHT)]
    ways = {root: root for root in roots}
    for module in (left := list(ways)):
        for there, at_once in imports(MODULES[module]):
            assert not (at_once and there.split(".")[0] in HEAVY), f"{ways[module]} imports {there}"
            if at_once and there in MODULES and there not in ways:
                ways[there] = f"{ways[module]} → {there}"
                left.append(there)


def test_files_are_short_enough_to_be_read():
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: count for module, count in lines.items() if count > LONGEST} == {}
