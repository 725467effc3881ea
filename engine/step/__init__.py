"""The parts of an optimizer step besides the chain: optimizer, schedule, guard, reported scalars."""
