"""The HTTP application: wiring only."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import Any, Protocol

from fastapi import Depends, FastAPI
from fastapi.concurrency import run_in_threadpool

from service.api import artifacts, capabilities, datasets, docs, health, jobs, metrics, models, problems, workers
from service.api.deps import require_key
from service.api.edge import Edge
from service.api.limits import Linger, SmallBodies
from service.contract.schemas import spec_components
from service.jobs import idempotency
from service.jobs.authentication import Authenticator
from service.jobs.readiness import Readiness
from service.services import Services
from service.store.session import DATABASE_AWAY

PREFIX = "/v1"
UPLOAD_PATHS = frozenset({f"{PREFIX}/jobs", "/jobs", f"{PREFIX}/models", f"{PREFIX}/datasets"})
DESCRIPTION = "Compresses trained TorchScript networks. Send `Authorization: Bearer KEY`; problems are RFC 9457."
_ABOUT: dict[str, Any] = {
    "title": "Rankpress",
    "version": version("rankpress"),
    "description": DESCRIPTION,
    "docs_url": None,
    "redoc_url": None,
}


class Component(Protocol):
    """Something that runs beside the API in the same process: the reconciler, the embedded worker."""

    def start(self) -> None:
        """Begin; returns once it runs."""

    def stop(self) -> None:
        """End; returns once it has ended."""


class _Application(FastAPI):
    """FastAPI, whose OpenAPI document has the parts of the job spec among its components."""

    def openapi(self) -> dict[str, Any]:
        """Build the document once."""
        if self.openapi_schema is None:
            document = super().openapi()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            document["components"]["schemas"] = dict(sorted((spec_components() | schemas).items()))
        return super().openapi()


def create_app(services: Services, *, components: Sequence[Component] = ()) -> FastAPI:
    """Build the application; `components` start with it, in their order, and stop with it in the reverse order."""
    app = _with_routes(_Application(lifespan=_lifespan_of(services, components), **_ABOUT))
    app.state.services = services
    app.state.authenticator = Authenticator(services)
    app.state.readiness = Readiness(services)
    app.state.metrics = metrics.Metrics(services)
    app.state.lookers = health.make_limiter()
    # The last one added is the outermost.
    app.add_middleware(SmallBodies, max_bytes=services.settings.max_body_bytes, upload_paths=UPLOAD_PATHS)
    app.add_middleware(Linger)
    app.add_middleware(Edge, observe=app.state.metrics.http_durations.observe)
    return app


def document() -> dict[str, Any]:
    """The OpenAPI document, without any service behind it."""
    return _with_routes(_Application(**_ABOUT)).openapi()


def _with_routes(app: FastAPI) -> FastAPI:
    problems.install(app, unavailable=DATABASE_AWAY)
    protected = [Depends(require_key)]
    # They are tried in this order, and jobs are asked for most.
    for module in (jobs, models, datasets, artifacts, workers, capabilities):
        app.include_router(module.router, prefix=PREFIX, dependencies=protected, responses=problems.RESPONSES)
    # Every route of jobs answers without the version too.
    app.include_router(jobs.router, dependencies=protected, include_in_schema=False)
    app.include_router(health.router, prefix=PREFIX)
    app.include_router(metrics.router, prefix=PREFIX)
    app.include_router(metrics.router, include_in_schema=False)
    app.include_router(docs.router)
    docs.mount_static_files(app)
    return app


def _lifespan_of(
    services: Services, components: Sequence[Component]
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if services.settings.embedded:  # one process alone holds the data directory
            await run_in_threadpool(idempotency.release_all, services)
        async with AsyncExitStack() as stack:
            for component in components:
                await run_in_threadpool(component.start)
                stack.push_async_callback(run_in_threadpool, component.stop)
            yield

    return lifespan
