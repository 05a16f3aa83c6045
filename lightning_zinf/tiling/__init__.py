"""Memory-centric tiling: big operators as sequences of tiles."""
