"""The slow twin of every faster backend: numpy, fp32, one plain function per operation."""

from duetto.backends.reference.backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
