"""INT weights in GPTQ layout: bit packing, the reference, the linear layer, checkpoints and their loading."""
