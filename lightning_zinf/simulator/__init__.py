"""Training on clusters, on paper: the strategies of the ZeRO-Infinity paper on the schedule that plans go by.

What it knows and what it assumes is in ``strategies.py``; ``published.py`` has the figures that it is held against.
"""
