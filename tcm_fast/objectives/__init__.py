"""The objectives: which noise levels, which targets, which loss."""
