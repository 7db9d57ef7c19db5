"""One forward path for all scripts: models, states, answers."""
