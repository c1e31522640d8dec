"""What a user's name of a model means, and the checkpoint folder behind it."""
