"""How good a network is: Fréchet distances, denoising, precision."""
