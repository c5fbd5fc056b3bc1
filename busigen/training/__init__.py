"""Training: autoencoder, context encoder, stages, healthy prior, LoRA adapters, merge. Needs the ``train`` extra."""
