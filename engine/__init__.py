"""Sequences, paged KV cache, scheduler, models and sampling: continuous batching."""
