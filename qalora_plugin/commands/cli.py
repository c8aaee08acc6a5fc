"""`qalora …`, and the same as `axolotl qalora …`."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from qalora_plugin.checkpoint.hub import expanded
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
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8; default: 4.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale (more groups = a freer adapter); default: 32.")
    ] = None,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Symmetric zero-points, or per-group ones.")] = False,
    act_order: Annotated[bool, typer.Option("--act-order", help="Quantise columns by activation size.")] = False,
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 256,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
    seed: int = 0,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Bits a weight, all included: each layer gets bits, and unless given a group size, of its own.", min=1
        ),
    ] = None,
    fisher: Annotated[
        bool | None,
        typer.Option(
            "--fisher/--no-fisher",
            help="With --budget: weight layers by Fisher information (backward passes); default: yes.",
        ),
    ] = None,
    clip: Annotated[
        bool | None,
        typer.Option("--clip/--no-clip", help="Clip grids where it lowers the error; default: at 2, 3 bits."),
    ] = None,
    gptaq: Annotated[
        bool | None,
        typer.Option("--gptaq/--no-gptaq", help="Fit to the 16-bit model's own outputs; default: unless experts."),
    ] = None,
    revision: Revision = None,
) -> None:
    """Make a GPTQ base of a 16-bit model (GPTQModel does the work)."""
    from qalora_plugin.checkpoint.hub import require_use_of_revision
    from qalora_plugin.commands.inspecting import made_of
    from qalora_plugin.methods.quantizing import quantize

    require_use_of_revision(revision, [model])
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
        fisher=fisher,
        gptaq=gptaq,
    )
    print(f"{printable(made)}: {made_of(made)}")


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
        str | None, typer.Option(help="float16 or float32; default: float16, or float32 where it has too few digits.")
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
    from qalora_plugin.checkpoint.hub import require_use_of_revision
    from qalora_plugin.conversion.merging import merge

    require_use_of_revision(revision, [base])
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

    from qalora_plugin.checkpoint.hub import require_use_of_revision
    from qalora_plugin.conversion.card import add_exactness
    from qalora_plugin.eval.tokens import read_texts
    from qalora_plugin.eval.verifying import verify

    require_use_of_revision(revision, [base])
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


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="Folders: dense, base, merged, an adapter (which names its base), or BASE+ADAPTER."),
    ],
    adapter: Annotated[list[str] | None, typer.Option(help="Also measure this adapter on the first MODEL.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help=".txt or .jsonl; every token counts.")] = None,
    jsonl: Annotated[
        list[Path] | None, typer.Option(help="Rows with questions and answers; the answers' tokens count.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Model to measure the KL divergence from.")] = None,
    generate: Annotated[int, typer.Option(help="Rows of each --jsonl to generate answers for.", min=0)] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Of a generated answer.", min=1)] = 256,
    answer_pattern: Annotated[
        str | None, typer.Option(help="Regular expression of the result in an answer; default: what follows ####.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm_eval, a comma between them.")] = None,
    tasks_path: Annotated[Path | None, typer.Option(help="Folder of further task files for lm_eval.")] = None,
    rows: Annotated[int | None, typer.Option(help="Most rows of each --jsonl, and of each task.", min=1)] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of each --text.", min=2)] = 65536,
    length: Annotated[int, typer.Option(help="Tokens of a sequence that texts are cut into.", min=2)] = 512,
    kl_tokens: Annotated[int, typer.Option(help="Tokens of each set to measure the KL on.", min=1)] = 4096,
    csv: Annotated[Path | None, typer.Option(help="New CSV file, a row as soon as it is measured.")] = None,
    png: Annotated[Path | None, typer.Option(help="New plot: loss against served bits.")] = None,
    dtype: Annotated[str, typer.Option(help="Compute dtype: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Losses, top-1, KL, generated answers, tasks; sizes and served bits: of any models, in one table."""
    import torch

    from qalora_plugin.commands.evaluating import evaluate
    from qalora_plugin.eval.planning import Settings

    settings = Settings(
        dtype=dtype, device=("cuda" if torch.cuda.is_available() else "cpu") if device is None else device,
        length=length, tokens=tokens, rows=rows, kl_tokens=kl_tokens, generate=generate, max_new_tokens=max_new_tokens,
        answer_pattern=answer_pattern,
    )  # fmt: skip
    evaluate(
        models, adapter or [], text or [], jsonl or [], settings, reference, tasks, tasks_path, revision, csv, png,
        as_json,
    )  # fmt: skip


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
    """Shows a :class:`QALoraError` as one line instead of a traceback, and looks at arguments before commands do."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with _errors_in_one_line():
            _require_no_empty(args)
            return super().make_context(info_name, [_expanded(text) for text in args], parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _errors_in_one_line():
            return super().invoke(ctx)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except QALoraError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)


def _require_no_empty(args: list[str]) -> None:
    """An empty path would be the working directory."""
    for before, text in zip(["", *args], args, strict=False):
        option, assigned, value = text.partition("=") if text.startswith("--") else (before, "=", text)
        if assigned and not value.strip():
            what = option if option.startswith("-") else "an argument"
            raise QALoraError(f"{what} is empty. Give it a value (is a variable of the shell unset?), or leave it out.")


def _expanded(text: str) -> str:
    """``~/`` is the home in ``--merged=~/merged``, too, where shells leave it."""
    option, assigned, value = text.partition("=") if text.startswith("--") else ("", "", text)
    return f"{option}{assigned}{expanded(value)}" if value.startswith("~/") else text


app.info.cls = _Command
command = typer.main.get_command(app)
