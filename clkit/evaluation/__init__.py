"""Continual evaluation: the callbacks that measure a run while it trains. The names live in their modules."""
