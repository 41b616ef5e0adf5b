"""Sampling with servers that have vLLM's API.

`sampler.py` samples, `versions.py` publishes the adapters, `client.py` is the HTTP client, and `proof.py` checks
that the completions come from the policy.
"""
