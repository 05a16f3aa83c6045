"""The optimizer step of sharded and offloaded state."""
