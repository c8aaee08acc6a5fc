"""`qalora export FORMAT SRC OUT`: a merged checkpoint, or an adapter, for other runtimes."""

from pathlib import Path
from typing import Annotated

import typer

from qalora_plugin.commands.summary import print_summary

app = typer.Typer(no_args_is_help=True)
Merged = Annotated[Path, typer.Argument(help="Merged checkpoint, or a base.")]
Out = Annotated[Path, typer.Argument(help="New folder.")]


@app.command()
def lora(
    adapter: Annotated[Path, typer.Argument(help="Folder of the trained adapter.")],
    out: Annotated[Path, typer.Argument(help="New folder for the PEFT LoRA.")],
    base: Annotated[str | None, typer.Option(help="GPTQ base; default: the one that the adapter names.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub id.")] = None,
) -> None:
    """An ordinary PEFT LoRA, to serve unmerged beside others: vllm serve BASE --enable-lora."""
    from qalora_plugin.checkpoint.hub import require_use_of_revision
    from qalora_plugin.conversion.lora import export_lora

    require_use_of_revision(revision, [base])
    print_summary(export_lora(adapter, out, base, revision))


@app.command()
def gguf(
    merged: Merged,
    out: Annotated[Path, typer.Argument(help="New .gguf file.")],
    like: Annotated[Path | None, typer.Option(help="A .gguf of the same model, to take the metadata from.")] = None,
    embeddings: Annotated[str, typer.Option(help="f16 or q8_0.")] = "f16",
    eight_bit: Annotated[str, typer.Option(help="8-bit linears, which Q4_1 cannot hold: f16 or q8_0.")] = "f16",
) -> None:
    """For llama.cpp and Ollama: Q4_1, whose blocks hold a float offset as ours do."""
    from qalora_plugin.conversion.export_gguf import export_gguf

    print_summary(export_gguf(merged, out, like=like, embeddings=embeddings, eight_bit=eight_bit))


@app.command()
def mlx(
    merged: Merged,
    out: Out,
    dtype: Annotated[str, typer.Option(help="Of scales and biases: float32, float16 or bfloat16.")] = "float32",
) -> None:
    """For MLX: affine groups, the same codes."""
    from qalora_plugin.conversion.export_mlx import export_mlx

    print_summary(export_mlx(merged, out, dtype=dtype))


@app.command()
def gptq8(
    merged: Merged,
    out: Out,
    group_size: Annotated[int | None, typer.Option(help="Default: the merged checkpoint's.")] = None,
    tokens: Annotated[
        int, typer.Option(help="Also measure what it does to the logits, on so many tokens; loads both in float32.")
    ] = 0,
) -> None:
    """For stock tools: 8-bit symmetric GPTQ, quantized again. Lossy; the loss is printed."""
    from qalora_plugin.conversion.export_gptq8 import export_gptq8
    from qalora_plugin.core.errors import QALoraError

    if tokens and tokens < 2:
        raise QALoraError(f"--tokens is {tokens}, expected 0, or 2 and more.")
    print_summary(export_gptq8(merged, out, group_size=group_size))
    if tokens:
        from qalora_plugin.eval.requantized import measure_requantized

        print(f"logits: {measure_requantized(merged, out, tokens)}")
