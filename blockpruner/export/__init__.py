"""Export: write a pruned model that others load. What is removed is decided elsewhere; here it is written and checked."""
