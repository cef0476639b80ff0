"""From constraints to grammars, and these at work on a vocabulary. Only here llguidance is known.

Knows no requests, no logits, no HTTP and no dialects of models.
"""
