"""Adapters over HTTP: administration, uploads, a watched folder, and what outlives a restart."""
