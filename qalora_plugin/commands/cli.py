"""`qalora …`, and the same as `axolotl qalora …`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from qalora_plugin.commands import exporting, importing
from qalora_plugin.commands.summary import print_summary
from qalora_plugin.core.errors import QALoraError, printable

app = typer.Typer(
    help="Fine-tune a GPTQ INT4 model, merge exactly, serve it still INT4.", no_args_is_help=True, add_completion=False
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a Hub id.")]


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="16-bit model: folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder for the GPTQ base.")],
    dataset: Annotated[str, typer.Option(help="Calibration text: a .txt or .jsonl file, or a Hub dataset id.")],
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale; more groups = a freer adapter.")] = 32,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Symmetric zero-points, or per-group ones.")] = False,
    act_order: Annotated[bool, typer.Option("--act-order", help="Quantise columns by activation size.")] = False,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 256,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
    seed: int = 0,
    budget: Annotated[
        float | None,
        typer.Option(help="Bits a weight, all included: bits and group size are chosen layer by layer.", min=1),
    ] = None,
    clip: Annotated[
        bool | None,
        typer.Option("--clip/--no-clip", help="Clip grids where it lowers the error; default: at 2, 3 bits."),
    ] = None,
    revision: Revision = None,
) -> None:
    """Make a GPTQ base of a 16-bit model (GPTQModel does the work)."""
    from qalora_plugin.methods.quantizing import quantize

    made = quantize(
        model,
        out,
        dataset,
        bits,
        group_size,
        sym,
        act_order,
        samples,
        length,
        seed,
        revision=revision,
        budget=budget,
        clip=clip,
    )
    print(printable(made))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Local checkpoint folder.")],
    rank: Annotated[int, typer.Option(help="Adapter rank to count parameters for.", min=1)] = 16,
    as_json: Json = False,
) -> None:
    """What a checkpoint is, whether it can be a base, and what an adapter on it costs."""
    from qalora_plugin.commands.inspecting import inspect

    report = inspect(path, rank)
    print(report.json()) if as_json else report.print()


@app.command()
def merge(
    base: Annotated[str, typer.Option(help="GPTQ base: folder or Hub id.")],
    adapter: Annotated[Path, typer.Option(help="Folder of the trained adapter.")],
    out: Annotated[Path, typer.Option(help="New folder for the merged checkpoint.")],
    offset_dtype: Annotated[
        str | None, typer.Option(help="float16 or float32; default: float16, float32 if the base has offsets already.")
    ] = None,
    offsets: Annotated[
        str,
        typer.Option(help="auto (factored where that is smaller), dense (as older versions of qalora read), factored."),
    ] = "auto",
    copy: Annotated[bool, typer.Option("--copy", help="Copy the base's shards instead of hard-linking them.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Then prove it, as `qalora verify` does.")] = False,
    revision: Revision = None,
) -> None:
    """Merge an adapter into its base: nothing re-quantised, the base's bytes unchanged."""
    from qalora_plugin.conversion.merging import merge

    result = merge(base, adapter, out, offset_dtype, copy, revision, offsets=offsets)
    print_summary(result)
    if verify:
        from qalora_plugin.eval.proof import prove

        if not prove(base, adapter, result.folder, revision=revision).passed:
            raise typer.Exit(1)
    else:
        paths = (shlex.quote(printable(path)) for path in (base, adapter, result.folder))
        print("not verified yet: qalora verify --base {} --adapter {} --merged {}".format(*paths))


@app.command()
def verify(
    base: Annotated[str, typer.Option(help="GPTQ base: folder or Hub id.")],
    adapter: Annotated[Path, typer.Option(help="Folder of the trained adapter.")],
    merged: Annotated[Path, typer.Option(help="Folder of the merged checkpoint.")],
    text: Annotated[Path | None, typer.Option(help=".txt or .jsonl; default: Python's own documentation.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to compare logits on.", min=2)] = 2048,
    dtype: Annotated[str, typer.Option(help="Compute dtype: float32, bfloat16 or float16.")] = "float32",
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Prove that merged = base + adapter (exit status 1 if not), and write the figures into the merged card."""
    import torch

    from qalora_plugin.conversion.card import add_exactness
    from qalora_plugin.eval.tokens import read_texts
    from qalora_plugin.eval.verifying import verify

    if dtype not in ("float32", "bfloat16", "float16"):
        raise QALoraError(f"--dtype is {dtype!r}, expected float32, bfloat16 or float16.")
    report = verify(
        base, adapter, merged,
        texts=read_texts(text) if text else None, max_tokens=tokens, dtype=getattr(torch, dtype), revision=revision,
        progress=not as_json,
    )  # fmt: skip
    print(report.json()) if as_json else report.print()
    add_exactness(merged, report)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def doctor(
    base: Annotated[
        Path | None, typer.Argument(help="GPTQ base or merged folder to ask about; else typical layers.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What this machine and environment will run: versions, devices, kernels, and why not faster ones."""
    from qalora_plugin.commands.doctor import diagnose

    diagnosis = diagnose(base)
    print(diagnosis.json()) if as_json else diagnosis.print()


app.add_typer(importing.app, name="import", help="Take in what was quantised, or trained, elsewhere.")
app.add_typer(exporting.app, name="export", help="Write a merged checkpoint, or an adapter, for other runtimes.")


class _Command(typer.core.TyperGroup):
    """Shows a :class:`QALoraError` as one line instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QALoraError as error:
            Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
            sys.exit(1)


app.info.cls = _Command
command = typer.main.get_command(app)
