"""What can be measured, one kind a file; each says there what it measures and what misleads."""

from ..task import Task
from .agreement import Agreement
from .continuation import Continuation
from .conversation import Conversation
from .recall import Recall, RecallBefore

# Agreement next to continuation, and the questions of one item of recall-before together: they share prompts.
BY_NAME: dict[str, Task] = {
    task.name: task for task in (Continuation(), Agreement(), Recall(), Conversation(), RecallBefore())
}
