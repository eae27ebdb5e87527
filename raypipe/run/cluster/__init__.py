"""Ray itself: its life, its machines, its actor pools. Only this room uses Ray's internals."""
