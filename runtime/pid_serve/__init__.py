"""Decoders behind HTTP: `pid-serve`."""
