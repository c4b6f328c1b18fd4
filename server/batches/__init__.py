"""Batches: files of requests, answered in the room that other requests leave."""
