"""Several cards, each in a process of its own."""
