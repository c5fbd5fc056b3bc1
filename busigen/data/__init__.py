"""Reading labelled breast-ultrasound folders into one prepared table and its arrays."""
