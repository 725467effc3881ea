"""The zero host: DeepSpeed's ZeRO around the unchanged chain."""
