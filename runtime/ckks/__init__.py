"""A polynomial model evaluated wholly on a worker under CKKS: the worker's server, the client's session, what they say."""
