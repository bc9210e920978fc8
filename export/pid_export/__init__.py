"""Turns PiD checkpoints into bundles, and verifies bundles against the reference."""
