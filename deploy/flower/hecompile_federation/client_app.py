"""Export the app that `flwr run` starts at every SuperNode."""

from hecompile.runtime.federation.flower import client_app as app

__all__ = ["app"]
