"""From a seed and an index to an accepted pair of image and mask."""
