"""One forward for all scripts: models, states, gradients, answers."""
