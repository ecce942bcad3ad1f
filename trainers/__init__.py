"""What learning means: records, rewards, advantages, losses, batching and the loop."""
