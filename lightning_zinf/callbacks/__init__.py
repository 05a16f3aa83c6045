"""Callbacks for training with the zinf strategy."""
