"""The server: `create_app` makes an ASGI application over an `OnlineRecommender`; `serve` runs it."""

try:
    from .app import create_app
    from .batching import Batcher
    from .run import serve
    from .server import Settings
except ModuleNotFoundError as error:
    raise ImportError(f"serving needs the package {error.name!r}: pip install mmrec-kernels[serve]") from error

__all__ = ["Batcher", "Settings", "create_app", "serve"]
