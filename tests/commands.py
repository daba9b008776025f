"""What the tests of the commands share: running them in this process, and models with another tokenizer."""

import json
import shutil
from pathlib import Path

from zm_mlx.flags import DEFAULT_MODEL

# Opens with a beginning of sequence and a system message; ``tone`` comes before the prompt, ``think`` after it.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if loop.first and tone %}[{{ tone }}]{% endif %}"
    "<{{ m['role'] }}>\n{{ m['content'] }}{% if not (loop.last and m['role'] == 'assistant') %}</>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% if think is defined %}({{ think }}){% endif %}{% endif %}"
)


def run(main, capsys, *argv):
    """Exit code, standard output and standard error of a command."""
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def document(out):
    return json.loads(out.splitlines()[-1])


def templated_model(folder: Path) -> str:
    """The small model with a chat template, in a folder of its own."""
    shutil.copytree(DEFAULT_MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)
