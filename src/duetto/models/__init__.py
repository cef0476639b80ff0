"""Models: one file per model_type turns a config into a Program; and what a checkpoint holds."""
