"""What stands before the decoder: captions from text, and latents from pictures.

Needs the extra `pipelines`: diffusers, transformers and torch.
"""
