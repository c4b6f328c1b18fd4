"""One module for each command, or for a few alike: its options, and a call to what does the work.

Nothing heavy is imported at the top: `--help` answers at once.
"""
