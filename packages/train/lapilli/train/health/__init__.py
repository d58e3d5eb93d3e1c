"""What guards a step: hangs, stragglers, bad losses, a slow network or disk."""
