"""Small synthetic worlds told in English documents, with questions about them and their answers.

Standard library only: `duetto eval` measures with them, and the demo models are trained on them.
Knows no tokens and no models. Why worlds are as they are: docs/design/demo-models.md.
"""
