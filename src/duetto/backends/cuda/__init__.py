"""The GPU backend: torch for tensors, streams and graphs, Triton for kernels.

Loaded only when it is used: `pip install duetto[cuda]` brings both.
"""
