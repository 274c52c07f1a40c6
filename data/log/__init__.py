"""Reading a log: files, formats, checks, and the scan into the engine."""
