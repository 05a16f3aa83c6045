"""The engine: units, hooks, and who is resident when."""
