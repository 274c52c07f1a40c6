"""Preparing a log, in memory that does not grow with it."""
