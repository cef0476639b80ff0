"""One file per model_type: a config becomes a Program. Also random models, and models by name."""
