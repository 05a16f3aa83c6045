"""Taking state out of an engine and putting it back."""
