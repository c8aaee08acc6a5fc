"""Run as a program: imports the packages that it is given, then each statement of standard input in a fork of its own.

What a fork has imported by then is theirs alone: of this project it starts with nothing, as a fresh process does.
"""

import importlib
import json
import os
import sys

OURS = ("qalora_plugin", "vllm_ext")


def error_of(statement: str) -> str:
    """Its error's last line as Python prints it, of a fork that ran it; "" for none."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as said:
            error = said.read()
        _, status = os.waitpid(child, 0)
        return error or (f"ended with status {status}" if status else "")
    try:
        exec(statement, {})
    except BaseException as error:
        os.write(writing, f"{type(error).__name__}: {error}".splitlines()[-1].encode())
    finally:
        os._exit(0)


if __name__ == "__main__":
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # or torch imports us
    for name in sys.argv[1:]:
        importlib.import_module(name)
    if known := [name for name in sys.modules if name.partition(".")[0] in OURS]:
        sys.exit(f"imported before any statement: {known}")
    errors = {statement: error_of(statement) for statement in json.load(sys.stdin)}
    json.dump({statement: error for statement, error in errors.items() if error}, sys.stdout)
