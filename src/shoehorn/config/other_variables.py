"""Environment variables besides settings: those that docker-compose.yml reads, and those of libraries and the engine.

Rules: docker-compose.yml passes every variable of `PASSED` from the host's environment, and all of `.env`; a test
compares it with this table and with the variables that the code reads. No variable here has an effect of its own in
Shoehorn's settings.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """An environment variable that is not a setting.

    Attributes:
        default: as docker-compose.yml has it; "" where unset.
    """

    name: str
    help: str
    default: str = ""


COMPOSE = (
    Variable("BIND", "Address of the host on which PORT is published; `0.0.0.0` for all.", "127.0.0.1"),
    Variable("PORT", "Public port on the host.", "6333"),
    Variable("METRICS_PORT", "Metrics port on the host, on 127.0.0.1 only.", "6334"),
    Variable("MODELS_VOLUME", "Named volume, or folder of the host (for example on another disk), that is mounted at "
             "/models. Create a folder with: sudo install -d -o 10001 -g 0 -m 770 FOLDER", "models"),
    Variable("SECRETS_DIR", "Folder of the host that is mounted at /run/secrets, for example for "
             "API_KEY_FILE=/run/secrets/api_key.", "./secrets"),
    Variable("RESTART", "Docker's restart policy. A refusal needs a change, so it is not retried indefinitely; "
             "`unless-stopped` also restarts the appliance after a reboot of the host.", "on-failure:3"),
    Variable("STOP_GRACE_PERIOD", "Time until Docker kills the container; at least DRAIN_TIMEOUT + 30 s.", "90s"),
    Variable("GRAFANA_PORT", "Port of Grafana on the host (`--profile monitoring`).", "3000"),
    Variable("PROMETHEUS_PORT", "Port of Prometheus on the host (`--profile monitoring`).", "9090"),
    Variable("PROMETHEUS_RETENTION", "Retention time of Prometheus.", "30d"),
    Variable("SHOEHORN_BASE_IMAGE", "Another base image for the build (BASE_IMAGE in the Dockerfile)."),
    Variable("SHOEHORN_ENV_FILE", "File that reaches the container instead of .env. Set it inside that file, and type: "
             "docker compose --env-file FILE up", ".env"),
)
"""Variables that docker-compose.yml reads on the host."""

INSIDE_ONLY = frozenset({"PORT", "METRICS_PORT", "MODELS_DIR", "RUN_DIR", "PUBLISHED_ADDRESS"})
"""Settings that a compose user does not set: ports are published and folders mounted."""

_PROXIES = (
    Variable("HTTPS_PROXY", "Proxy for the hubs, for example `http://proxy.example.com:3128`; also socks5 and socks5h. "
             "Percent-encode special characters of a password (`#` is `%23`)."),
    Variable("HTTP_PROXY", "Proxy for hubs and mirrors without TLS."),
    Variable("ALL_PROXY", "Proxy for both."),
    Variable("NO_PROXY", "Hosts that are reached without a proxy, separated by commas."),
)

PASSED = (
    *_PROXIES,
    *(Variable(each.name.lower(), f"Same as {each.name}.") for each in _PROXIES),
    Variable("SSL_CERT_FILE", "Certificates of the authorities to trust instead of the public ones, in one PEM file "
             "inside the container."),
    Variable("SSL_CERT_DIR", "Folder of such certificates, prepared with `openssl rehash`."),
    Variable("REQUESTS_CA_BUNDLE", "Same as SSL_CERT_FILE."),
    Variable("CURL_CA_BUNDLE", "Same as SSL_CERT_FILE."),
    Variable("CUDA_VISIBLE_DEVICES", "GPUs to use, by index or UUID (its first digits are enough), separated by "
             "commas; as CUDA reads it, so an empty value hides all."),
    Variable("CUDA_DEVICE_ORDER", "Numbering of the GPUs in CUDA_VISIBLE_DEVICES: `PCI_BUS_ID` as in nvidia-smi, or "
             "`FASTEST_FIRST`, CUDA's default."),
    *(Variable(name, "NCCL, the communication between GPUs.") for name in (
        "NCCL_ALGO", "NCCL_BUFFSIZE", "NCCL_CROSS_NIC", "NCCL_CUMEM_ENABLE", "NCCL_CUMEM_HOST_ENABLE", "NCCL_DEBUG",
        "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_MAX_NCHANNELS",
        "NCCL_MIN_NCHANNELS", "NCCL_NET", "NCCL_NET_GDR_LEVEL", "NCCL_NVLS_ENABLE", "NCCL_P2P_DISABLE",
        "NCCL_P2P_LEVEL", "NCCL_PROTO", "NCCL_SHM_DISABLE", "NCCL_SOCKET_FAMILY", "NCCL_SOCKET_IFNAME",
        "NCCL_TOPO_FILE")),
    Variable("PYTORCH_ALLOC_CONF", "PyTorch's allocator, instead of the plan's configuration."),
    Variable("PYTORCH_CUDA_ALLOC_CONF", "Same as PYTORCH_ALLOC_CONF."),
    Variable("OMP_NUM_THREADS", "Threads of each engine process on the CPU."),
    Variable("VLLM_HOST_IP", "Address by which the engine's processes connect to each other."),
    Variable("VLLM_MAX_COMPLETION_PROMPTS", "Maximum number of prompts in one request (128)."),
    Variable("VLLM_MAX_N_SEQUENCES", "Maximum number of answers to one request (128)."),
    Variable("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "1: follow redirects of images' URLs."),
    Variable("SHOEHORN_INT4_DECODE", "`on`: batches of up to 8 rows take Shoehorn's own INT4 kernel on a GPU "
             "(off; docs/int4.md)."),
    Variable("SHOEHORN_TIMING", "Waits of the engine program in seconds, as a JSON object."),
)
"""Variables of libraries, CUDA and the engine that pass through to the programs."""
