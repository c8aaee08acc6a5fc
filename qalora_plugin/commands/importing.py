"""`qalora import FORMAT SRC OUT`: what was quantized, or trained, elsewhere. Not one code is changed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qalora_plugin.commands.summary import print_summary
from qalora_plugin.core.errors import QALoraError

if TYPE_CHECKING:
    from qalora_plugin.formats.awq import Awq
    from qalora_plugin.formats.compressed_tensors import CompressedTensors

app = typer.Typer(no_args_is_help=True)
Out = Annotated[Path, typer.Argument(help="New folder.")]
Source = Annotated[str, typer.Argument(help="Checkpoint: folder or Hub id.")]
Adapter = Annotated[Path, typer.Argument(help="Folder of the trained adapter, with adapter_config.json.")]
Base = Annotated[str | None, typer.Option(help="GPTQ base it was trained on; default: the one that it names.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a Hub id.")]


@app.command()
def gguf(
    src: Annotated[Path, typer.Argument(help="The .gguf file.")],
    out: Out,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the tokenizer; default: made from the file's own.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the model's config; default: made from the file's metadata.")
    ] = None,
) -> None:
    """A llama.cpp model as a base with float offsets."""
    from qalora_plugin.conversion.import_gguf import import_gguf

    print_summary(import_gguf(src, out, tokenizer=tokenizer, model_config=config))


@app.command()
def awq(src: Source, out: Out) -> None:
    """An AWQ checkpoint (gemm) as a GPTQ base."""
    from qalora_plugin.formats.awq import Awq

    _packed(Awq, src, out)


@app.command("compressed-tensors")
def compressed_tensors(src: Source, out: Out) -> None:
    """A compressed-tensors checkpoint (pack-quantized) as a GPTQ base."""
    from qalora_plugin.formats.compressed_tensors import CompressedTensors

    _packed(CompressedTensors, src, out)


def _packed(kind: "type[Awq] | type[CompressedTensors]", src: str, out: Path) -> None:
    from qalora_plugin.checkpoint.folder import Checkpoint

    files = Checkpoint.open(src)
    if not kind.detect(files.quantization):
        found = "dense" if files.method is None else f"quantized by {files.method}"
        raise QALoraError(
            f"{src} is {found}, expected quant_method {kind.method!r}. See what it is: qalora inspect FOLDER."
        )
    from qalora_plugin.conversion.import_packed import import_packed

    print_summary(import_packed(src, out))


@app.command()
def peft(src: Adapter, out: Out, base: Base = None, revision: Revision = None) -> None:
    """An adapter trained by PEFT with use_qalora, as one of ours."""
    from qalora_plugin.checkpoint.hub import require_use_of_revision
    from qalora_plugin.conversion.import_adapter import import_peft

    require_use_of_revision(revision, [base])
    print_summary(import_peft(src, out, base, revision))


@app.command()
def official(
    src: Annotated[Path, typer.Argument(help="Folder of an adapter, or of what merge.py wrote.")],
    out: Out,
    base: Annotated[
        str | None,
        typer.Option(help="GPTQ base it was trained on. Of a merged model it gives the integer zero-points."),
    ] = None,
    revision: Revision = None,
) -> None:
    """An adapter, or a merged model with float zero-points, of the official QA-LoRA repository."""
    from qalora_plugin.checkpoint.hub import require_use_of_revision
    from qalora_plugin.conversion.import_official import import_official

    require_use_of_revision(revision, [base])
    print_summary(import_official(src, out, base, revision))
