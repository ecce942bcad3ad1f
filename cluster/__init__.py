"""Where things run and how bytes move; knows no word of reinforcement learning."""
