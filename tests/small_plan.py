"""The beginning of a plan of one small stage, for tests of what its data and tasks say."""

HEAD = """
name: run
tokenizer: {vocabulary}
model: {{preset: tiny, vision_layers: 2, text_layers: 1, alignment_layers: 1, generation_layers: 1}}
batch: {{micro_batch_size_per_gpu: 4}}
stages:
  - name: one
    steps: 5
"""
"""Up to the stage's steps, for ``str.format`` with ``vocabulary``: a tokenizer."""
