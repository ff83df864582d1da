"""Saving with a model card, and publishing on the Hugging Face hub."""

import inspect
import os
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers import ModelMixin
from huggingface_hub import HfApi

from morse.files import write_bytes

CARD = "README.md"


class Publishable:
    """Adds a model card to what a diffusers model or pipeline saves, and publishes both.

    A class names its card in `model_card`. A card that is there already is never replaced: people
    write licence, data and results into it.
    """

    def model_card(self) -> str:
        """Write the card: what is known about the model, and what is not."""
        raise NotImplementedError

    # Pipelines look at the signature of a component's `save_pretrained` to see what it takes.
    @wraps(ModelMixin.save_pretrained)
    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: object, **kwargs: object
    ) -> None:
        """Save as diffusers does, with a model card; `push_to_hub=True` publishes the folder.

        With `is_main_process=False`, as for all but one process, a model leaves both to that one.
        """
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        push = kwargs.pop("push_to_hub", False)
        given = inspect.signature(super().save_pretrained).bind(save_directory, *args, **kwargs)
        super().save_pretrained(save_directory, *args, **kwargs)
        if not given.arguments.get("is_main_process", True):
            return
        card = Path(save_directory) / CARD
        if not card.exists():
            # Whole or not at all: half a card would never be replaced.
            write_bytes(card, self.model_card().encode())
        if push:
            publish(Path(save_directory), **{"repo_id": Path(save_directory).name, **options})

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> object:
        """Publish on the hub, with model cards where the repository has none yet.

        Args:
            repo_id: Name of the repository, made if it doesn't exist, as "name" or "owner/name".
            commit_message: Message of the commit.
            private: Whether a new repository is private; None for the owner's default.
            token: Access token; None for the one stored by `hf auth login`.
            create_pr: Whether to open a pull request instead.
            safe_serialization: True, as only safetensors are published.
            variant: Weights are saved under this variant's name, such as "fp16".
            subfolder: Folder in the repository; None for its root.

        Returns:
            What `HfApi.upload_folder` returns: the commit.

        Raises:
            ValueError: If `safe_serialization` is False.
        """
        if not safe_serialization:
            raise ValueError(
                f"safe_serialization is {safe_serialization!r}, but Morse publishes safetensors "
                "only; leave it out."
            )
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            options = {"private": private, "token": token, "create_pr": create_pr}
            return publish(
                Path(folder), repo_id, commit_message=commit_message, subfolder=subfolder, **options
            )


def renew_card(model: Publishable, folder: Path, before: str) -> None:
    """Write the card of a saved model that has changed since, unless somebody wrote into it.

    Args:
        model: As it is to be saved again.
        folder: Where it was saved.
        before: Its card as it was then.
    """
    card = folder / CARD
    if card.exists() and card.read_text(encoding="utf-8") == before:
        write_bytes(card, model.model_card().encode())


def publish(
    folder: Path,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> object:
    """Upload a saved folder; the arguments are `Publishable.push_to_hub`'s."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    cards = [path.relative_to(folder).as_posix() for path in folder.rglob(CARD)]
    prefix = f"{subfolder}/" if subfolder else ""
    kept = [card for card in cards if api.file_exists(repo_id, f"{prefix}{card}")]
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=subfolder,
        commit_message=commit_message or "Upload with Morse",
        create_pr=create_pr,
        ignore_patterns=kept or None,
    )
