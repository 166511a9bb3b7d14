"""Conversion: continued training of a checkpoint towards polynomials in place of softmax, RMSNorm and SiLU."""
