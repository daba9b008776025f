"""What the evaluation is made of: prompts read once, caches by name, tasks, scores."""
