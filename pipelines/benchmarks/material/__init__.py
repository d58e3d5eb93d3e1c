"""What is measured on: photos, conversations, datasets of LLaVA's size."""
