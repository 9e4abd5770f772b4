"""Metrics, which read what the node knows, and the process that it runs in: never called by the core."""
