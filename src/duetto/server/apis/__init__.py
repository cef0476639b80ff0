"""OpenAI's API: parses bodies, and gives replies and events their shape."""
