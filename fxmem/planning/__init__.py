"""What to keep, what to make again and what to encode: plans, and how they are found."""
