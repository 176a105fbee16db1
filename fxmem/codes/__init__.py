"""Encodings: what a saved tensor may be kept as, without loss and with."""
