"""The fused operations in other people's networks."""
