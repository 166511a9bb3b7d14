"""Export the app that `flwr run` starts at the SuperLink."""

from hecompile.runtime.federation.flower import server_app as app

__all__ = ["app"]
