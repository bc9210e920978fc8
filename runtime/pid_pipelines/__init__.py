"""What stands before the decoder: captions from text, and latents from pictures and prompts.

Needs the extra `pipelines`: diffusers, transformers and torch.
"""
