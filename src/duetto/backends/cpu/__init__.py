"""The fast backend: packed weights and native kernels (csrc/), one native call per step."""
