"""Samples of images and videos with captions and labels: sources, order, decoding, augmentation, batches."""
