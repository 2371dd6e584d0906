"""The gateway: the OpenAI-compatible HTTP API over the service."""
