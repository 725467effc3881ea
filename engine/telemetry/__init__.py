"""What a run reports while it trains: metrics, speed, console, environment."""
