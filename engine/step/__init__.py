"""What one optimizer step consists of beside the chain: optimizer, schedule, guard, reported scalars."""
