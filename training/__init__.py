"""Trains the demo models (docs/design/demo-models.md). The only folder that imports torch."""
