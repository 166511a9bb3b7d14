"""Bound what an adapter tells about one example of the data it was trained on: differential privacy.

Calls go one way: `promise` (a run's noise) → `ledger` (the record, δ and the budget) → `accountant` (what releases cost).
`sampling`, `clipping` and `noise` make a release. None of them knows of training.
"""
