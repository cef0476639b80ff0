"""Where a model comes from: weights, configs, tokenizers, chat templates, the hub."""
