# make demo: set up everything and run the main job.   make test: set up everything and pass the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup develop demo test check vllm gpu-wheels docker-steps clean

setup: .venv/ready

develop: .venv/develop

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	PATH="$(CURDIR)/$(BIN):$$PATH" docker/install.sh torch
	PATH="$(CURDIR)/$(BIN):$$PATH" docker/install.sh --editable .
	touch $@

.venv/develop: .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" docker/install.sh --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/perl-rlhf run recipes/quickstart.yaml

test: develop
	$(BIN)/python -m pytest

check: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile
	$(BIN)/shellcheck docker/*.sh .ci/run
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose.yaml

# vLLM for `pytest -m vllm -n 0`.
VLLM_VENV ?= .venv-vllm
vllm: $(VLLM_VENV)/ready

$(VLLM_VENV)/ready:
	PYTHON="$(PYTHON)" docker/vllm.sh $(VLLM_VENV)
	touch $@

# Wheels that benchmarks/gpu needs on a machine with torch, transformers and peft but no network: at most 64 MiB.
GPU_WHEELS ?= .gpu-wheels
GPU_PYTHON ?= 3.12
PLATFORMS := manylinux_2_28_x86_64 manylinux_2_24_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64
gpu-wheels: setup
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
		--python-version $(GPU_PYTHON) $(PLATFORMS:%=--platform %) \
		--constraint constraints.txt --requirement benchmarks/gpu/wheels.txt --dest $(GPU_WHEELS)
	test "$$(du -sm $(GPU_WHEELS) | cut -f1)" -le 64

# Runs both Dockerfiles' commands in a clean root without a container engine: needs root on Linux and some minutes.
docker-steps: develop
	$(BIN)/python -m tests.docker_steps docker/cpu.Dockerfile docker/cuda.Dockerfile

clean:
	rm -rf .venv runs build *.egg-info
