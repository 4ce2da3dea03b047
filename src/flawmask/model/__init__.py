"""The network: architectures by name, pretrained weights, checkpoints."""
