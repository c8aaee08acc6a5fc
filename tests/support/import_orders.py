"""Every public name and every module of this project, imported first and alone in a process of its own."""

import json
import pkgutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import qalora_plugin


def public_names(but: tuple[str, ...] = ()) -> list[str]:
    return [f"from qalora_plugin import {name}" for name in qalora_plugin.__all__ if name not in but]


def modules(package, but: tuple[str, ...] = ()) -> list[str]:
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [f"import {module.name}" for module in found if module.name not in but]


def failures(statements: list[str]) -> dict[str, str]:
    """Statement → last line of its error, of those that fail; two processes at a time."""

    def run(statement: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True)

    with ThreadPoolExecutor(2) as workers:
        done = zip(statements, workers.map(run, statements), strict=True)
        return {statement: result.stderr.splitlines()[-1] for statement, result in done if result.returncode}


def failures_after(packages: tuple[str, ...], statements: list[str]) -> dict[str, str]:
    """As :func:`failures`, once other people's packages have been imported: many times as fast."""
    command = [sys.executable, Path(__file__).with_name("import_after.py"), *packages]
    done = subprocess.run(command, input=json.dumps(statements), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
