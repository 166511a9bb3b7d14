"""Compute approximately on ciphertexts by CKKS, for the polynomial plan.

Microsoft SEAL, by TenSEAL, makes keys and ciphertexts and opens them. The worker's arithmetic on the words of ciphertexts is
compiled here and equals SEAL's evaluator bit for bit.
"""
