"""From the user's rows to the micro-batches of a step, reproducibly."""
