"""The audit: evidence about any labelled set of breast-ultrasound images, judged against real ones."""
