"""A task of one's own: a table or a YAML file."""

from dataclasses import replace

import pytest

import prompts
import tasks
from tasks import guessing, own


def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return str(path)


def tickets(rows=30, header="id;message;queue", labels=("bug", "bug report", "billing")):
    lines = [f'{i};"It broke; again {i},\nand again";{labels[i % len(labels)]}' for i in range(rows)]
    return "\n".join([header, *lines, ""])


# ----------------------------------------------------------------------------------------------- a task as a YAML file


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_of_the_table_comes_back_from_its_file(tmp_path, name):
    own.write_task(tmp_path / "task.yaml", tasks.get(name))
    assert own.read_task(tmp_path / "task.yaml") == tasks.get(name)


def test_the_labels_that_a_task_took_from_its_data_come_back(tmp_path):
    task = replace(tasks.get("MentalHealth"), labels=("Calm", "Worry"), words=("calm", "worry"))
    own.write_task(tmp_path / "task.yaml", task)
    assert own.read_task(tmp_path / "task.yaml") == task


@pytest.mark.parametrize(
    "labels", [("bug", "bug report", "Billing {x}: ä"), ("0", "1"), ("yes", "no"), ("1.5", "2", "7.25")]
)
def test_a_table_s_task_comes_back_from_its_file(tmp_path, labels):
    task = guessing.task_of(write(tmp_path, "tickets.csv", tickets(labels=labels)))
    (tmp_path / "run").mkdir()
    own.write_task(tmp_path / "run" / "task.yaml", task)
    assert own.read_task(tmp_path / "run" / "task.yaml") == task
    assert task.number == ("1.5" in labels) and prompts.wording_of(task).body == "Message: {message}"
