"""Power loss: a process with an outbox is killed at a random instant, or at a step, again and again."""
