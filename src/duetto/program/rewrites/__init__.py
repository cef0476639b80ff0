"""Rewrites of a Program: into another that gives the same logits, or a part of them."""
