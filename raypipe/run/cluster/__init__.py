"""Ray itself: its life, its machines, its actor pools. The only room that touches its internals."""
