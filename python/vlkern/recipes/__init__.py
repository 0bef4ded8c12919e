"""How each system is trained: its optimiser, its schedule and its step."""
