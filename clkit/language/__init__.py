"""Instruction streams for language models."""
