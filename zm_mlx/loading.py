"""Loading a model for a command: its tokenizer first, so that what needs the vocabulary fails before the weights."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from mlx_lm import utils

from .errors import UserError
from .host.part import Way, split

WIDENED = "Model: the small model, in float32 (16-bit numbers are slow on a CPU)"
NO_LIMIT = 10**30  # tokens; what transformers itself takes for "no limit"
VOCABULARY = ["*.json", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl", "*.jinja"]


@dataclass(frozen=True)
class Source:
    """Where a model comes from; ``asked`` is how messages call it, where it is not ``--model``."""

    name: str
    asked: str = "--model"
    adapter: str | None = None
    trust_remote_code: bool = False
    tokenizer_config: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        return f"{self.asked} {self.name}"

    @property
    def metadata(self) -> dict[str, str]:
        """What a saved prompt notes of it, as mlx-lm does; ``saved_source`` reads it."""
        settings = {"trust_remote_code": self.trust_remote_code, **self.tokenizer_config}
        return {"model": self.name, "tokenizer_config": json.dumps(settings)}


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokenizer and the number of tokens that its logits have."""

    tokenizer: Any
    size: int

    def add_eos(self, token: str) -> None:
        """End generation at one more token, named or by number as in mlx-lm.

        Raises:
            UserError: the tokenizer has no such token.
        """
        if not token.strip().isdecimal():
            self.require("--extra-eos-token", token)
        elif len(token) > 18 or int(token) >= self.size:
            raise UserError(f"--extra-eos-token {token} must be below {self.size}, the size of the model's vocabulary")
        self.tokenizer.add_eos_token(token)

    def require(self, flag: str, token: str) -> None:
        """Raise ``UserError`` unless the tokenizer has a token of this name."""
        if token not in self.tokenizer.get_vocab():
            raise UserError(f"{flag} {token}: not one of the {self.size} tokens of this model")


def load_vocabulary(source: Source) -> Vocabulary:
    """The tokenizer, from the small files of a model.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    _check_folder(source)
    _check_adapter(source.adapter)
    config = {**source.tokenizer_config, "trust_remote_code": source.trust_remote_code}
    try:
        path = utils._download(source.name, allow_patterns=VOCABULARY)
        model = utils.load_config(path)
        if "model_file" not in model:
            utils._get_classes(model)  # before transformers, whose words for an unknown model are many
        tokenizer = utils.load_tokenizer(path, config, eos_token_ids=model.get("eos_token_id"))
    except Exception as error:  # the loader, the Hub's client and the network fail in many ways
        _refuse(source, error)
    # Longer prompts are warned of by the model's context; transformers would add that they end in errors.
    tokenizer.model_max_length = NO_LIMIT
    nested = model.get("text_config")
    sizes = [model.get("vocab_size"), nested.get("vocab_size") if isinstance(nested, dict) else None]
    return Vocabulary(tokenizer, next((n for n in sizes if isinstance(n, int)), len(tokenizer)))


def load_model(source: Source, way: Way | None = None) -> nn.Module:
    """The model itself, with its adapter.

    Args:
        way: how it is split among the processes of ``mlx.launch``, which all call this, where there are several.

    Raises:
        UserError: it cannot be loaded, the adapter does not fit, or it cannot be split so.
    """
    try:
        path = utils._download(source.name)
        model: nn.Module = utils.load_model(path, lazy=way is not None, trust_remote_code=source.trust_remote_code)[0]
    except Exception as error:
        _refuse(source, error)
    if way is not None:
        split(model, source.words, way)
    if source.adapter is not None:
        try:
            model = utils.load_adapters(model, source.adapter)
        except Exception as error:
            raise UserError(
                f"--adapter-path {source.adapter}: cannot be loaded into this model ({type(error).__name__}: {error})"
            ) from error
        model.eval()
    return model


def load_split(
    repo: str,
    pipeline_group: Any = None,
    tensor_group: Any = None,
    return_config: bool = True,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """In place of mlx-lm's ``sharded_load``: a model that is a part knows what it is a part of.

    Each machine needs all files of the model; a pipeline needs no ``model.safetensors.index.json``.

    Raises:
        UserError: it cannot be split so.
    """
    path = utils._download(repo)
    model, config = utils.load_model(path, lazy=True, trust_remote_code=trust_remote_code)
    tokenizer = utils.load_tokenizer(path, tokenizer_config, eos_token_ids=config.get("eos_token_id"))
    split(model, f"model {repo}", "heads" if pipeline_group is None else "layers")
    return model, tokenizer, config


def widen(model: nn.Module, itemsize: int | None = None) -> bool:
    """Let a small model compute in float32 on a CPU, where MLX's products of 16-bit numbers take many times as long.

    Args:
        model: as loaded; its weights take twice the memory afterwards.
        itemsize: bytes a number in the rows of a saved prompt, which then decide instead of the machine.

    Returns:
        Whether it computes in float32 now.
    """
    wide = mx.default_device() == mx.cpu if itemsize is None else itemsize == mx.float32.size
    if wide:
        model.set_dtype(mx.float32)
    return wide


def folder_of(name: str) -> Path | None:
    """Where the files of a model that was loaded lie; ``None`` if nobody knows."""
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # loaded from elsewhere (ModelScope), or the Hub's cache is gone meanwhile
        return None


def saved_source(metadata: dict[str, Any], file: str) -> tuple[str | None, dict[str, Any]]:
    """The model and the tokenizer's settings that a saved prompt was made with.

    Raises:
        UserError: the file says neither in a way that can be read.
    """
    name = metadata.get("model")
    text = metadata.get("tokenizer_config", "{}")
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not (name is None or isinstance(name, str)):
        what = "model" if isinstance(config, dict) else "tokenizer_config"
        raise UserError(f"--prompt-cache-file {file}: its {what} is damaged; make the file anew")
    return name, config


def _check_folder(source: Source) -> None:
    if not os.path.exists(source.name):
        return
    if not os.path.isdir(source.name):
        raise UserError(f"{source.words}: cannot be loaded: a model is a folder, this is a file")
    if not os.path.isfile(os.path.join(source.name, "config.json")):
        raise UserError(f"{source.words}: cannot be loaded: the folder has no config.json")


def _check_adapter(adapter: str | None) -> None:
    if adapter is None:
        return
    if not os.path.isdir(adapter):
        raise UserError(f"--adapter-path {adapter}: no such folder")
    for name in ("adapter_config.json", "adapters.safetensors"):
        if not (Path(adapter) / name).is_file():
            raise UserError(f"--adapter-path {adapter}: the folder has no {name}")


def _refuse(source: Source, error: Exception) -> NoReturn:
    cause = f"({type(error).__name__}: {error})"
    if os.path.exists(source.name):
        raise UserError(f"{source.words}: cannot be loaded {cause}") from error
    raise UserError(
        f"{source.words}: not a local folder, and the Hugging Face Hub does not have it or cannot be reached; "
        f"check the name and the network {cause}"
    ) from error
