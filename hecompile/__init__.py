"""Compile a Hugging Face model so that an untrusted worker fine-tunes it on ciphertexts only."""

__version__ = "0.1.0"
