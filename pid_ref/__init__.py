"""The PiD network in plain PyTorch, its registry of checkpoints, and how to load them."""
