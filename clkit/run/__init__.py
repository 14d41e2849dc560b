"""The command line, and the life of a run: training, checkpoints, sweeps and the run's folder."""
