"""The pipeline host: DeepSpeed passes micro-batches through stages of the chain."""
