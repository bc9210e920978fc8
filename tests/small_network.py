"""The sizes of a network that is exported in seconds."""

DIMENSIONS = {
    "hidden_size": 64,
    "num_heads": 2,
    "patch_depth": 2,
    "pixel_hidden_size": 4,
    "pixel_attn_size": 48,
    "pixel_num_heads": 2,
    "pixel_depth": 1,
    "text_dim": 32,
    "text_max_length": 12,
    "latent_hidden": 16,
}
"""Those of golden file flux_2k, most of whose stages are traced for other tests too, and half of
its depth, as rounding grows in such a network."""
