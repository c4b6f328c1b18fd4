"""The page at ``/``: a chat playground and live charts, without a build step."""
