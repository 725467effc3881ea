"""The chain and its contract: layers over one state, the layout of a step, objectives, heads and losses."""
