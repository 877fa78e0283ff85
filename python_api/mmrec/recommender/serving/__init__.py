"""The server: `create_app` makes an ASGI application over an `OnlineRecommender`; `serve` runs it."""

from .app import Settings, create_app
from .batching import Batcher
from .run import serve

__all__ = ["Batcher", "Settings", "create_app", "serve"]
