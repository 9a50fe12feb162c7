"""Images from a trained network, and image files."""
