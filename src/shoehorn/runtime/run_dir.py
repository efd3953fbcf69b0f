"""Layout of RUN_DIR: the only place that names its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shoehorn_vllm.protocol import EXPERTS_FILE


@dataclass(frozen=True)
class RunDir:
    """The paths in the run directory of one start. `gateway/nginx.conf.j2` gets them from here."""

    path: Path

    @property
    def lock(self) -> Path:
        """Lock of the one appliance that uses the directory."""
        return self.path / "lock"

    @property
    def empty(self) -> Path:
        """Empty folder: document root of closed locations, and model path of SageMaker's hooks."""
        return self.path / "nothing"

    # State, for the exporter, the gateway and the health check.

    @property
    def state(self) -> Path:
        """State document."""
        return self.path / "state.json"

    @property
    def ready_mark(self) -> Path:
        """Empty file that exists exactly in the phase `ready`."""
        return self.path / "ready"

    @property
    def not_live_mark(self) -> Path:
        """Empty file that exists while the appliance has failed or its engine is down."""
        return self.path / "not-live"

    @property
    def idle_mark(self) -> Path:
        """Empty file that exists exactly in the phase `idle`."""
        return self.path / "idle"

    @property
    def wake_request(self) -> Path:
        """Mark by which the key service asks the engine program to start the engine."""
        return self.path / "wake"

    def unavailable_body(self, dialect: str) -> Path:
        """Body of a 503 in the error form of `openai` or `anthropic`."""
        return self.path / ("unavailable.json" if dialect == "openai" else f"unavailable.{dialect}.json")

    @property
    def plan(self) -> Path:
        """The plan of the current start."""
        return self.path / "plan.json"

    @property
    def welcome(self) -> Path:
        """Facts of the text that is printed when the model is ready, with the first key."""
        return self.path / "welcome.txt"

    # The engine.

    @property
    def engine_socket(self) -> Path:
        """Unix socket of vLLM's API server."""
        return self.path / "engine.sock"

    @property
    def engine_config(self) -> Path:
        """vLLM's options."""
        return self.path / "vllm.yaml"

    @property
    def engine_log(self) -> Path:
        """Output of the engine with ENGINE_LOG=file."""
        return self.path / "engine.log"

    @property
    def engine_logging(self) -> Path:
        """vLLM's logging configuration."""
        return self.path / "engine-logging.json"

    @property
    def engine_memory(self) -> Path:
        """Folder of the engine's memory reports, one file for each process."""
        return self.path / "engine-memory"

    @property
    def expert_lookups(self) -> Path:
        """Counts of the experts that the engine needed, in the same folder: a new start removes both."""
        return self.engine_memory / EXPERTS_FILE

    @property
    def engine_alive(self) -> Path:
        """Mark of an engine program that was not stopped properly."""
        return self.path / "engine.alive"

    @property
    def restarts(self) -> Path:
        """Times of the engine's restarts."""
        return self.path / "restarts.json"

    @property
    def admissions(self) -> Path:
        """Times of the requests that were admitted in the last minute, of keys with a limit on requests."""
        return self.path / "admissions"

    @property
    def engine_group(self) -> Path:
        """Process group of the engine."""
        return self.path / "engine.group"

    @property
    def fork_server_group(self) -> Path:
        """Process group of the fork server."""
        return self.path / "fork-server.group"

    @property
    def pull_group(self) -> Path:
        """Process group of a running pull or conversion."""
        return self.path / "pull.group"

    @property
    def groups(self) -> tuple[Path, ...]:
        """Records of all process groups that a successor terminates."""
        return self.fork_server_group, self.engine_group, self.pull_group, self.ray_group

    @property
    def drain_request(self) -> Path:
        """Mark by which `shoehorn drain` asks the engine program."""
        return self.path / "drain"

    @property
    def drain_result(self) -> Path:
        """Result of a drain, for `shoehorn drain`."""
        return self.path / "drained.json"

    # The cluster (ROLE=head and worker).

    @property
    def cluster(self) -> Path:
        """Folder of the credentials of a node."""
        return self.path / "cluster"

    @property
    def ray_token(self) -> Path:
        """Token of Ray."""
        return self.cluster / "ray-token"

    @property
    def cluster_authority(self) -> Path:
        """Certificate of the authority that issues the nodes' certificates."""
        return self.cluster / "authority.pem"

    @property
    def node_certificate(self) -> Path:
        """Certificate of this node."""
        return self.cluster / "node.pem"

    @property
    def node_key(self) -> Path:
        """Private key of this node."""
        return self.cluster / "node.key"

    @property
    def node_reports(self) -> Path:
        """Latest report of each worker, on the head."""
        return self.path / "nodes.json"

    @property
    def head_orders(self) -> Path:
        """Orders of the head."""
        return self.path / "orders.json"

    @property
    def ray(self) -> Path:
        """Ray's folder for logs and sockets."""
        return self.path / "ray"

    @property
    def ray_state(self) -> Path:
        """State of this node's Ray."""
        return self.path / "ray.json"

    @property
    def ray_group(self) -> Path:
        """Process group of Ray."""
        return self.path / "ray.group"

    # supervisord, nginx and the key service.

    @property
    def supervisord_config(self) -> Path:
        """supervisord's configuration."""
        return self.path / "supervisord.conf"

    @property
    def supervisord_pid(self) -> Path:
        """supervisord's process id."""
        return self.path / "supervisord.pid"

    @property
    def exit_code(self) -> Path:
        """Exit code of the container, written by the program that failed."""
        return self.path / "exit_code"

    @property
    def nginx_config(self) -> Path:
        """nginx's configuration."""
        return self.path / "nginx.conf"

    @property
    def nginx_pid(self) -> Path:
        """Process id of nginx's master."""
        return self.path / "nginx.pid"

    def nginx_temporary(self, kind: str) -> Path:
        """Folder of nginx's temporary files of one kind (`body`, `proxy`, ...)."""
        return self.path / f"nginx-{kind}"

    @property
    def keys_socket(self) -> Path:
        """Unix socket of the key service."""
        return self.path / "keys.sock"

    @property
    def setting_key(self) -> Path:
        """Hash of API_KEY."""
        return self.path / "keys.json"

    @property
    def tls_pair(self) -> Path:
        """TLS key and certificate chain in use."""
        return self.path / "tls.pem"

    @property
    def tls_candidate(self) -> Path:
        """TLS key and certificate chain that are being checked."""
        return self.path / "tls.pem.candidate"

    # A front and its replicas.

    @property
    def balancer_config(self) -> Path:
        """HAProxy's configuration."""
        return self.path / "haproxy.cfg"

    @property
    def balancer_socket(self) -> Path:
        """Unix socket on which HAProxy takes requests for the replicas."""
        return self.path / "haproxy.sock"

    @property
    def balancer_stats(self) -> Path:
        """Unix socket of HAProxy's statistics."""
        return self.path / "haproxy-stats.sock"

    @property
    def peer_authority(self) -> Path:
        """Certificate of the authority of front and replicas."""
        return self.path / "peers.pem"

    @property
    def peer_pair(self) -> Path:
        """Own certificate and key for the connections between front and replicas."""
        return self.path / "peer.pem"

    @property
    def leaving_mark(self) -> Path:
        """Empty file that exists while a replica still serves, but asks its front for no new requests."""
        return self.path / "lame-duck"

    def token(self, variable: str) -> Path:
        """Secret of one environment variable, for the programs that need it."""
        return self.path / variable.lower()
