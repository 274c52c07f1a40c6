"""A picture of a log before anyone trains, and how a new log differs from the one trained on."""
