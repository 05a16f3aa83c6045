"""Talking to the other ranks: bulk data over torch.distributed, agreement over a channel of its own."""
