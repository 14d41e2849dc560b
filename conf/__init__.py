"""Hydra configs: one YAML a strategy, scenario, model, trainer and experiment."""
