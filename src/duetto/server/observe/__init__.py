"""What can be asked about the past: metrics, timelines, logs, and why a request was slow."""
