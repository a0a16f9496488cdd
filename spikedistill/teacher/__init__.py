"""1. The trained ANN: architectures, weights, named activations."""
