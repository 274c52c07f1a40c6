"""Fused operators, one file each, with an eager reference and a CPU implementation."""
