"""Convert a checkpoint: train it further with polynomials in place of softmax, RMSNorm and SiLU."""
