"""Adapters over HTTP: administration, uploads, a watched folder, and state across restarts."""
