"""How good answers are: synthetic worlds, and questions about them."""
