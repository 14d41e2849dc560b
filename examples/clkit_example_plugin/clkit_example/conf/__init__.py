"""Configurations for clkit, one folder a group."""
