"""One step from end to end: captured, planned, rewritten, run and checked."""
