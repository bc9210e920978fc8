"""Pictures to latents and back without a network, for bundles of space `nano`."""
