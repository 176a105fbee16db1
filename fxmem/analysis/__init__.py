"""What a step holds and how long it takes, without running it."""
