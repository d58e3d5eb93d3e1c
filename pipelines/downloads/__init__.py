"""What recipes need of the published data, and how a file of it is got."""
