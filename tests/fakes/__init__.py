"""What tests put in the place of the real thing: a GPU, and engines."""
