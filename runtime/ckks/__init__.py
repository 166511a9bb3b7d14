"""Evaluate a polynomial model wholly on a worker under CKKS: the worker's server, the client's session, their messages."""
