"""Load on a served model: open-loop arrivals, latencies without omission, and the best settings."""
