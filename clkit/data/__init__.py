"""Streams of experiences, their datamodule, and the batches it serves."""
