"""Uploaded files, and the database that they and what uses them are kept in."""
