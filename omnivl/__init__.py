"""Images, videos and text: data, model, objectives and evaluation. Knows nothing of ranks, optimizers or DeepSpeed."""
