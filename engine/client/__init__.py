"""The clients of the service."""
