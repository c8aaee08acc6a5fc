"""One merge of ``merge.py`` in a process of its own: the command (the arguments after it), or the function.

    merge_worker.py command merge --base BASE …
    merge_worker.py function BASE ADAPTER OUT links|copy

Answers on stdout, on a line that starts with @@: ``{"peak_mb": …}``, of the function also its ``seconds``.
"""

import atexit
import json
import os
import shutil
import sys
import time
from pathlib import Path


def prepare(base: str | Path, out: str | Path) -> None:
    """Leave an idle disk and enough free memory, in the guest itself where this is a virtual machine.

    A page that was given back to the host, as free ones are after seconds, costs many times as much at its next use.
    """
    shutil.copytree(base, out)
    shutil.rmtree(out)
    os.sync()


def report(**found: float) -> None:
    # The kernel's own figure: getrusage would count the pages of the parent, too, from before the exec.
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    print("@@" + json.dumps(found | {"peak_mb": peak}))


def main() -> None:
    kind = sys.argv.pop(1)
    if kind == "command":
        from qalora_plugin.commands.cli import app

        atexit.register(report)  # the command ends the process
        app()
    else:
        import torch  # noqa: F401 (loaded, as in a training run)

        from qalora_plugin import merge

        base, adapter, out, how = sys.argv[1:]
        prepare(base, out)
        start = time.perf_counter()
        merge(base, adapter, out, copy=how == "copy", progress=False)
        report(seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main()
