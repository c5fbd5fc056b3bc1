"""busigen: healthy breast-ultrasound images in, benign or malignant ones with their exact lesion mask out."""

__version__ = "0.1.0"
