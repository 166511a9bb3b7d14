"""Polynomial approximations: how they are chosen, and how they are evaluated, on numbers, tensors or graph values alike."""
