"""The held-out exam of messages that people type: nothing in the training data is like it."""
import pytest

from nanochat.core.world import World
from nanochat.post.public import TASKS, make_task
from nanochat.post.tasks import normal, shape_of, wild_shapes
from nanochat.post.wild import Wild

CONVERSATIONS = 3000


@pytest.fixture(scope="module")
def world(): return World(42)


@pytest.fixture(scope="module")
def typed(world): return {normal(row["messages"][-2]["content"]) for row in Wild("wild", "test", 42, world)} - {""}


@pytest.mark.parametrize("name", TASKS)
def test_no_message_of_the_exam_is_trained_on(name, world, typed):
    task = make_task(name, "train", 42, world)
    said = {m["content"] for i in range(CONVERSATIONS) for m in task[i]["messages"] if m["role"] == "user"}
    assert {text for text in said if normal(text) in typed} == set()
    assert {text for text in said if shape_of(text) in wild_shapes()} == set()
