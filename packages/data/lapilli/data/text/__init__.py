"""Conversations to token ids: templates, chat templates and tokenizers."""
