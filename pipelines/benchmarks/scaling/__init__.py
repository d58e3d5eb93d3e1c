"""What a preprocessing run takes on a cluster: a calculation, and its check against builds."""
