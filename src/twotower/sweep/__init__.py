"""Searching a job's best settings: the space, the trials, and what they leave."""
