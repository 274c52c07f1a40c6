"""JSON over HTTP in front of Triton, for callers without a Triton client: `twotower gateway`."""
