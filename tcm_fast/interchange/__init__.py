"""Other projects' files to ours and back."""
