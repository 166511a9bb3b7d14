"""Encrypt under RLWE with a shared public matrix, where evaluating a linear layer is one integer product.

`scheme` has the verbs (keygen, encrypt, evaluate, decrypt, setup); `random.sampling` has the only randomness.
"""
