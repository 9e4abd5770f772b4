"""Bytes to events and back: no sockets, clocks, threads or asyncio."""
