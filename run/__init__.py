"""One run and what is left of it: arguments, folder, checkpoints, history, dashboards."""
