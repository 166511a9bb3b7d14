"""Choose polynomial approximations, and evaluate them on numbers, tensors or graph values alike."""
