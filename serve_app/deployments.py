"""The Serve deployments, the only file with @serve.deployment; and the ingress, which needs no torch.

Options that depend on the machine (replicas, GPUs, queue lengths) belong in deploy/*.yaml; those here are bounds that
hold wherever nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster import session
from cluster.errors import Overloaded
from cluster.settings import Settings
from serve_app import handle, ingress
from serve_app.guard import Guard
from serve_app.oip_grpc import GrpcMethods
from serve_app.service import Service

MAX_QUEUED_REQUESTS = 128  # a handle; more are refused, and the caller is told when to come back
MAX_ONGOING_REQUESTS = 32


@serve.ingress()
class IngressReplica(GrpcMethods):
    """HTTP and gRPC over a Service. `handles` are (encoder, decoder, cellfinder or None) of each model in turn."""

    def __init__(self, settings: Settings, names: list[str], *handles: DeploymentHandle | None) -> None:
        for one in filter(None, handles):  # routed on the loop that calls them: each way, a change of threads less
            one._init(_run_router_in_separate_loop=False)
        self.guard = Guard(settings.service, session.http_host())
        self.service = Service(settings, names, handles)
        self.inner = ingress.create_app(self.service, None)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return ingress.create_app(self.service, self.guard)

    async def http(self, method: str, url: str, headers: list[tuple[bytes, bytes]], body: bytes) -> handle.Answer:
        """For callers inside the cluster: the same application, by Serve's handle and without a guard: who has a
        handle may do all."""
        return await handle.answer(self.inner, method, url, headers, body)


def deployment(replica: Callable[..., Any], name: str) -> serve.Deployment:
    """A deployment of that name with this file's bounds; deploy YAML overrides them by the name."""
    bounds = serve.deployment(
        name=name,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_QUEUED_REQUESTS,
        backpressure_config={"retry_after_s": Overloaded.retry_after_s},
        graceful_shutdown_timeout_s=60,
        max_surge_percent=100,  # an update's new replicas are ready before old ones end
    )
    return bounds(replica)
