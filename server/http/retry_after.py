"""Seconds after which a client that was turned away should try again."""

from __future__ import annotations

# What is in the way is a few requests, which will soon be done.
BUSY = 5
# The server starts, stops or recovers from a failure.
UNAVAILABLE = 10
# Jobs must end first, which take minutes.
JOBS_UNFINISHED = 60
# At most, however long the queue.
LONGEST = 600
