"""The service: an engine behind a ZeroMQ socket."""
