"""What a run runs on: its processes, precisions and CUDA graphs."""
