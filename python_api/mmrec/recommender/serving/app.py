"""The application: routes over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from fastapi import FastAPI, Query, Response
from fastapi.responses import FileResponse, HTMLResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..online import OnlineRecommender
from .limits import Guard
from .metrics import CONTENT_TYPE
from .responses import HANDLERS, as_json, responses_of
from .schemas import FoundItems, Health, ItemsIn, ItemsOut, RecommendIn, RecommendOut, RemoveIn, RemoveOut
from .server import Server, Settings
from .upsert import Encode

__all__ = ["create_app"]

_KEPT = {"cache-control": "max-age=3600"}
_NO_IMAGE = (
    """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 3"><rect width="2" height="3" fill="#8885"/></svg>"""
)


def create_app(
    online: OnlineRecommender,
    settings: Settings | None = None,
    *,
    image: Callable[[str], Path | None] | None = None,
    encode: Encode | None = None,
) -> FastAPI:
    """An ASGI application over `online`, whose store other processes may write to meanwhile.

    Args:
        online: answers; with `costs`, requests may state a budget.
        settings: None for the defaults.
        image: item id → file of its image, or None where it has none, for the page.
        encode: items by column → rows of the store: without it `POST /items` takes vectors only.
    """
    settings = settings or Settings()
    server = Server(online, settings, encode)
    app = FastAPI(
        title="mmrec", lifespan=server.lifespan, responses=responses_of(400, 413, 415, 422), version="1",
        description="Multimodal recommendations within a budget of milliseconds.",
    )  # fmt: skip
    writing = ("/items", "/items/remove")
    token = {} if settings.token is None else {("POST", path): settings.token for path in writing}
    app.add_middleware(
        Guard, limits=dict.fromkeys(writing, settings.max_items_body), default=settings.max_body, guarded=token,
        count=server.metrics.count,
    )  # fmt: skip
    if settings.hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts))
    for error, handler in HANDLERS.items():
        app.add_exception_handler(error, handler)
    app.state.server = server

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))

    @app.post("/recommend", response_model=RecommendOut, responses=responses_of(503))
    async def recommend(body: RecommendIn) -> Response:
        """The best items after a history."""
        return await server.recommend(body)

    @app.get("/items", response_model=FoundItems)
    async def find(
        text: str = Query("", max_length=200, description="in any case; empty: any items"),
        limit: int = Query(20, ge=1, le=100),
    ) -> Response:
        """Items whose title or id holds a text."""
        version = online.version
        rows = await asyncio.to_thread(version.find, text, limit)
        found = zip(version.ids(rows), version.titles(rows), strict=True)
        return as_json({"items": [{"id": name, "title": title} for name, title in found]})

    if settings.writable:

        @app.post("/items", response_model=ItemsOut, responses=responses_of(401, 409, 503, 507))
        async def upsert(body: ItemsIn) -> Response:
            """Puts items in: they are on the disk, and served, when this answers."""
            return await server.upsert(body)

        @app.post("/items/remove", response_model=RemoveOut, responses=responses_of(401, 409, 503, 507))
        async def remove(body: RemoveIn) -> Response:
            """Removes items: no request that comes after this has answered finds them. Unknown ones are named."""
            return await server.remove(body)

    @app.get("/health", response_model=Health, responses=responses_of(503))
    async def health() -> Response:
        """That the server can answer."""
        return server.health()

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(server.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/images/{item:path}", include_in_schema=False)
    async def poster(item: str) -> Response:
        path = None if image is None else image(item)
        if path is None or not path.is_file():
            return Response(_NO_IMAGE, media_type="image/svg+xml")
        return FileResponse(path, headers=_KEPT)

    return app
