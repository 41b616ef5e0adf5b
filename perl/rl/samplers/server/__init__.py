"""Sampling by servers that speak as vLLM does.

`sampler.py` draws, `versions.py` brings the adapters there, `client.py` is the HTTP, and `proof.py` sees that what
was drawn is of the policy.
"""
