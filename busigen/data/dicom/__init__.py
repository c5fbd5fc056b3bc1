"""Ultrasound DICOM: what a file says of itself, and its frames."""
