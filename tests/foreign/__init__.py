"""What programs of others read and compute, in environments of their own."""
