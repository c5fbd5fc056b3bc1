"""The reader study: a page on which people tell real from synthetic images, and what their answers add up to."""
