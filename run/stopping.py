"""Ends training between two steps when a signal asks for it (see faults.py)."""

from transformers import TrainerCallback

from machine import processes
from run.faults import Guard


class StopCallback(TrainerCallback):
    """Tells the guard whether a trainer is at work, and ends its training after the step in which a signal came."""

    def __init__(self, guard: Guard):
        self.guard = guard

    def on_train_begin(self, args, state, control, **kwargs):
        self.guard.training = True

    def on_train_end(self, args, state, control, **kwargs):
        self.guard.training = False

    def on_step_end(self, args, state, control, **kwargs):
        # All processes end at the same step, whichever of them received the signal.
        received = processes.all_gather([self.guard.received])
        self.guard.received = next((number for number in received if number is not None), None)
        if self.guard.received is not None:
            control.should_save = control.should_training_stop = True

    on_evaluate = on_step_end

    def on_save(self, args, state, control, **kwargs):
        if self.guard.received is not None:
            control.should_training_stop = True
