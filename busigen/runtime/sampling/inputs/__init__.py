"""What a sample begins with: a healthy image, from a folder or of a phantom, and a given mask, put somewhere."""
