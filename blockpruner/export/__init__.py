"""Export: write a pruned model that others load. What to remove is decided elsewhere."""
