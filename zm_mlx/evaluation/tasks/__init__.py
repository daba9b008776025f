"""What can be measured, one kind a file; each says there what it measures and what misleads."""

from ..task import Task
from .agreement import Agreement
from .continuation import Continuation
from .conversation import Conversation
from .recall import Recall, RecallBefore

# Agreement next to continuation, whose prompts it shares.
BY_NAME: dict[str, Task] = {
    task.name: task for task in (Continuation(), Agreement(), Recall(), RecallBefore(), Conversation())
}
