"""Training: autoencoder, context encoder, three stages, healthy prior, LoRA adapters, merge. Needs the ``train`` extra."""
