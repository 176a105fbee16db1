"""The joint graph of a training step: captured, looked at, cut in two, run once to measure."""
