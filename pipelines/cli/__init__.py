"""What the verbs share: arguments, errors, progress, terminal text."""
