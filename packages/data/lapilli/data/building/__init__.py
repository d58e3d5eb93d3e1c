"""From a plan to shards: Ray Data's tasks, their recovery, and finishing a dataset."""
