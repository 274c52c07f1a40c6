"""Checkpoints: written on any number of ranks, read on any other, without a pickle."""
