"""OpenAI's Responses: bodies, events, what is stored."""
