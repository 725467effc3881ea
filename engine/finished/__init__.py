"""What is done with a finished stage: loading, evaluation, export."""
