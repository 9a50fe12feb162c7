"""What fits on a GPU and how long it takes, computed."""
