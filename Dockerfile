# Shoehorn's image, two flavours from the same stages:
#   docker build -t shoehorn:gpu .                           CUDA 13, Python 3.12 (requires NVIDIA driver 580 or newer)
#   docker build -t shoehorn:cpu --build-arg FLAVOUR=cpu .   no GPU, Python 3.11
# Build arguments:
#   FLAVOUR     gpu (default) or cpu: the lock of requirements/ to install
#   BASE_IMAGE  another base for the same flavour, for example from a mirror: Debian or Ubuntu with the lock's Python
# The base of the GPU flavour is NVIDIA's smallest: torch installs the CUDA libraries as wheels, the driver comes from the
# host. BuildKit pulls only the base in use. `make pin-base` updates the digests.
ARG FLAVOUR=gpu
ARG BASE_IMAGE

FROM ${BASE_IMAGE:-nvidia/cuda:13.0.2-base-ubuntu24.04@sha256:2ab6381d970b211fb93853796dc6707eb8a72575a375c422b17cf4d8b2641701} AS base-gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${BASE_IMAGE:-debian:bookworm-20260610-slim@sha256:96e378d7e6531ac9a15ad505478fcc2e69f371b10f5cdf87857c4b8188404716} AS base-cpu
ENV VRAM_PROFILE=cpu

# Packages of the distribution for the builder and the final image. Compilers and headers are for Triton, which compiles
# its launchers at run time (C), and for torch.compile on a CPU (C++).
FROM base-${FLAVOUR} AS base
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ gcc haproxy libc6-dev libnuma1 nginx python3 python3-dev tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/log/apt /var/log/dpkg.log

# The virtual environment: every file is verified against its hash in the lock, nothing is built, and byte code is compiled
# now because the root file system is read-only at run time. uv installs the CPU torch from PyTorch's index unless the base
# image contains a wheel.
FROM base AS builder
ARG FLAVOUR
WORKDIR /build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
COPY --chown=root:root requirements/build.txt ./
RUN python3 -m venv /opt/uv \
    && /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --no-deps -r build.txt
COPY --chown=root:root requirements/${FLAVOUR}.txt ./lock.txt
RUN --mount=type=cache,target=/root/.cache/uv \
    if [ "$FLAVOUR" = cpu ] && ! ls "${UV_FIND_LINKS:-/none}"/torch-*+cpu-*.whl >/dev/null 2>&1; then \
        set -- --torch-backend cpu; \
    fi \
    && /opt/uv/bin/uv venv --quiet --python /usr/bin/python3 /opt/venv \
    && /opt/uv/bin/uv pip install --quiet --python /opt/venv/bin/python --link-mode copy --compile-bytecode \
        --require-hashes --no-deps --no-build "$@" -r lock.txt \
    && rm -f /opt/venv/.lock
COPY --chown=root:root requirements/supply-chain.txt ./
RUN --mount=type=cache,target=/root/.cache/uv \
    /opt/uv/bin/uv venv --quiet --python /usr/bin/python3 /opt/supply-chain \
    && /opt/uv/bin/uv pip install --quiet --python /opt/supply-chain/bin/python --link-mode copy \
        --require-hashes --no-deps --no-build -r supply-chain.txt

FROM base
LABEL org.opencontainers.image.title="Shoehorn" \
    org.opencontainers.image.description="Fits big language models onto small GPUs" \
    org.opencontainers.image.licenses="Apache-2.0"
COPY --from=builder --chown=root:root /opt/venv /opt/venv

# The account of all programs. Group 0 has the same write access, so any other uid in that group works too.
RUN useradd --uid 10001 --gid 0 --no-log-init --home-dir /home/shoehorn --shell /usr/sbin/nologin shoehorn \
    && install -d -o shoehorn -g root -m 0770 /home/shoehorn /models /run/shoehorn /var/cache/shoehorn

WORKDIR /opt/shoehorn
COPY --chown=root:root . .
# Installs metadata, command and byte code, and compiles the library of the CPU kernel; the sources stay in place.
RUN --mount=type=bind,from=builder,source=/opt/uv,target=/opt/uv \
    find . \( ! -perm -0444 -o -perm /0022 \) -exec chmod go=u,go-w {} + \
    && /opt/uv/bin/uv pip install --quiet --no-cache --python /opt/venv/bin/python --offline \
        --no-deps --no-build-isolation --editable . \
    && test -r src/shoehorn_vllm/hybrid/kernel/w4a16.so \
    && /opt/venv/bin/python -m compileall -q -f src healthcheck \
    && rm -f /opt/venv/.lock /tmp/uv-*.lock
# The bill of materials.
RUN --mount=type=bind,from=builder,source=/opt/supply-chain,target=/opt/supply-chain \
    /opt/supply-chain/bin/python -B tools/sbom.py --environment /opt/venv/bin/python --debian \
        --out /usr/share/doc/shoehorn/sbom.json

ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/home/shoehorn \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/var/cache/shoehorn \
    VLLM_CACHE_ROOT=/var/cache/shoehorn/vllm \
    TRITON_CACHE_DIR=/var/cache/shoehorn/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/shoehorn/inductor \
    CUDA_CACHE_PATH=/var/cache/shoehorn/cuda \
    CUDA_CACHE_MAXSIZE=2147483648 \
    NUMBA_CACHE_DIR=/var/cache/shoehorn/numba

VOLUME ["/models", "/var/cache/shoehorn"]
EXPOSE 6333 6334
STOPSIGNAL SIGTERM
# A container that is not ready is unhealthy only after the start period, which covers the download of a large model.
HEALTHCHECK --interval=30s --timeout=7s --retries=3 --start-period=24h --start-interval=5s \
    CMD ["python", "/opt/shoehorn/healthcheck/healthcheck.py", "ready"]
USER shoehorn
ENTRYPOINT ["tini", "--", "python", "/opt/shoehorn/entrypoint.py"]
