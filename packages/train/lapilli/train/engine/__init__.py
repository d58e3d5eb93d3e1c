"""DeepSpeed's engine: its settings, and access to the state it partitions."""
