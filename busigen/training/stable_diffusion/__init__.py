"""Stable Diffusion inpainting models as a base: reading what users have, LoRAs for it, and it as a velocity network."""
