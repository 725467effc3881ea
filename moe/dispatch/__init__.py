"""From choices to rows in the order of the experts, and back."""
