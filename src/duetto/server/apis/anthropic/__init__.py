"""Anthropic's Messages: bodies, events, errors."""
