"""The settings of the record and of what is looked at beside the run."""

from __future__ import annotations

from dataclasses import dataclass

from settings import kinds
from settings.kinds import Kind
from settings.setting import of_group

setting = of_group("records")


@dataclass(frozen=True)
class RecordSettings:
    """Where the record goes, and what else is in it."""

    output_dir: str = setting("runs", kinds.FOLDER, "where records go")
    checkpoint_every: str = setting(
        "1m",
        Kind("a number of epochs (5), or a time (90s, 10m, 2h)", kinds.interval),
        "how often a checkpoint is written, beside the one at the end",
    )
    watch: int = setting(0, kinds.whole(0), "in every so many steps, what each layer loses: layers.jsonl; 0: never")
    watch_also: tuple[str, ...] = setting(
        (),
        kinds.TRIED,
        "what that would be in another format, or under another recipe, on the tensors of this run; repeatable",
        default_text="none",
    )
    shadow: bool = setting(
        False,
        kinds.SWITCH,
        "train the same in float32 beside it: shadow.jsonl has how far off this run is",
        default_text="off",
    )
    sample: int = setting(0, kinds.whole(0), "so many characters of text that the model makes up at the end; 0: none")
    wandb: str = setting(
        "auto",
        kinds.one_of("auto", "online", "offline", "disabled"),
        "Weights & Biases; auto: WANDB_MODE, else online with an API key, else offline",
    )
    wandb_project: str | None = setting(
        None, kinds.or_none(kinds.NAME), "wandb project", default_text="low-precision-ml"
    )
    wandb_entity: str | None = setting(
        None, kinds.or_none(kinds.NAME), "wandb entity", default_text="wandb's own setting"
    )
