"""Parts of a model, ranks and stages, each in a process of its own, behind one Backend."""
