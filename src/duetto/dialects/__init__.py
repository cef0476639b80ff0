"""What a model's text means: content, reasoning, calls of tools; one file per family.

Knows no tokens, no HTTP and no grammar library: text in, pieces out.
"""
