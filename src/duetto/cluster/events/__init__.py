"""KV events between processes: vLLM's format, a publisher that replays, and who follows it."""
