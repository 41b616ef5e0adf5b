#!/bin/sh
# Healthy if all three stages of recipes/health.yaml run and write a report, which takes seconds.
#
#   healthcheck [DEVICE]    with cuda, it must have run on a GPU
#
# It trains its own tiny base, so all checks do the same work and none touches the volumes.
set -eu

for folder in runs "$XDG_CACHE_HOME"; do
    if ! [ -w "$folder" ]; then
        echo "unhealthy: user $(id -u) cannot write $folder; see Volumes in docs/containers.md" >&2
        exit 1
    fi
done

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# One thread at a lower priority, so that the main run goes first; at the lowest, busy cores would give it no time.
TMPDIR="$scratch" XDG_CACHE_HOME="$scratch" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 timeout 280 nice -n 5 \
    perl-rlhf run recipes/health.yaml --out "$scratch/health"
if ! grep -q "\"device\": \"${1:-}" "$scratch/health/report.json"; then
    echo "unhealthy: no GPU did it; give the container one (--gpus all), or use the CPU image" >&2
    exit 1
fi
echo healthy
