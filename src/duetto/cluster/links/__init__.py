"""What carries KV from one engine to another."""
