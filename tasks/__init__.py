"""Everything known of tasks and their files."""

from tasks.table import SUITES, TASKS, Task, get, suite

__all__ = ["SUITES", "TASKS", "Task", "get", "suite"]
