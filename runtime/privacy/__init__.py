"""Differential privacy: what an adapter may tell about one example of the data it was trained on.

`accountant` (what releases cost), `noise` and `clipping` (a release) and `ledger` (the record) know nothing of training.
"""
