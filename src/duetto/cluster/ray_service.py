"""Workers as an application of Ray Serve, which KubeRay's RayService runs: deploy/rayservice.yaml.

Ray Serve keeps a number of them, asks after their health and replaces those that fail. It routes
nothing: each worker joins the router of Duetto, and requests come from there.
"""

from importlib import import_module
from typing import Any

from duetto.cluster.child_workers import DRAIN_S, worker_command
from duetto.cluster.facts import ROLES, WorkerRole
from duetto.cluster.ray_workers import RayError, WorkerActor, import_ray

_SERVE = "serve"
_IP = "{ip}"  # in an argument: the address of the node


class ServedWorker(WorkerActor):
    """A worker that drains when Ray Serve lets it go."""

    def __init__(self, arguments: list[str], role: WorkerRole) -> None:
        address = str(import_ray().util.get_node_ip_address())
        super().__init__(worker_command([a.replace(_IP, address) for a in arguments])(role))

    def __del__(self) -> None:
        if hasattr(self, "_worker"):
            self.drain(DRAIN_S)


def workers(arguments: dict[str, Any]) -> Any:
    """The application: `worker` is the command line after duetto worker, `role` is added.

    Raises RayError for arguments that are not so.
    """
    command, role = arguments.get("worker"), arguments.get("role", "both")
    if role not in ROLES:
        raise RayError(f"role {role!s:.40}: accepted: {', '.join(ROLES)}")
    if not isinstance(command, list) or not all(isinstance(word, str) for word in command):
        raise RayError("worker: must be a list of words, like [MODEL, --join, tcp://router:9000]")
    serve = import_module(f"{import_ray().__name__}.{_SERVE}")
    return serve.deployment(ServedWorker, name="DuettoWorker").bind(command, role)
