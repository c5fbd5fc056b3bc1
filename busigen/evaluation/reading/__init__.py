"""Reading the sets of an audit: any layout, parted into held-out and training images, cut to size."""
