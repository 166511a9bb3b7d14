"""CKKS: approximate arithmetic on ciphertexts, for the polynomial plan. Microsoft SEAL, by TenSEAL, makes keys and
ciphertexts and opens them; what a worker computes on the words of ciphertexts is compiled here and equals SEAL's evaluator
bit for bit."""
