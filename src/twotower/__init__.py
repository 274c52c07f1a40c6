"""Two-tower retrieval: from an event log to guarded live traffic."""

__version__ = "0.1.0"
