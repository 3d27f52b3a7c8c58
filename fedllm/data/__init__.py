"""Sources, prompts, partitions and batches."""
