"""Scoring: how much worse the model gets without each candidate block. Chooses nothing; `search` does."""
