"""What `lapilli doctor --cluster` finds on the nodes of a cluster."""
