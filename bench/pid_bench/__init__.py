"""Benchmarks of the decoder. Nothing else imports this package."""
