"""What ours is compared with, in the same run."""
