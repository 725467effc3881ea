"""Feed-forward layers and mixtures of experts: tensors in, tensors out. Knows nothing of images, text or DeepSpeed."""
