"""What `flwr run` starts at the SuperLink."""

from runtime.federation.flower import server_app as app

__all__ = ["app"]
