"""Conversation rows, the collator that makes training batches of them, and the synthetic documents."""
