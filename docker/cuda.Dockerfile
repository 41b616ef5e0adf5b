# PERL on NVIDIA GPUs; docs/containers.md says how to build and run it. cpu.Dockerfile except where it says CUDA.
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY perl perl
RUN pip wheel --quiet --no-deps --wheel-dir /dist .

FROM python:3.11-slim-bookworm
RUN useradd --no-log-init --uid 10001 --user-group --create-home perl \
    && install --directory --owner=perl --group=perl /work/runs /cache \
    && python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# Separate layers for torch, the other libraries and PERL: a change in one does not rebuild those before it.
WORKDIR /opt/install
COPY constraints.txt ./
COPY docker/install.sh docker/
# CUDA: the package index's Linux build includes CUDA's libraries; the host provides only the driver.
RUN --mount=type=cache,target=/root/.cache/pip docker/install.sh torch
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip docker/install.sh requirements
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist docker/install.sh --no-deps /dist/*.whl

WORKDIR /work
COPY recipes recipes
COPY data/story-openings.jsonl data/
COPY data/coffee-base data/coffee-base
COPY --chmod=755 docker/healthcheck.sh /usr/local/bin/healthcheck

ENV XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface MPLCONFIGDIR=/cache/matplotlib PYTHONUNBUFFERED=1
# CUDA: what NVIDIA's container runtime makes available.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/work/runs", "/cache"]
USER 10001:10001
ENTRYPOINT ["perl-rlhf"]
CMD ["--help"]
# CUDA: the check requires a GPU.
HEALTHCHECK --interval=30m --timeout=5m --start-period=2m --retries=2 CMD ["healthcheck", "cuda"]
