"""Nodes of a Ray cluster: which there are, which an autoscaler adds, what each has."""
