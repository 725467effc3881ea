"""What a run tells while it trains: metrics, speed, console, environment."""
