"""The settings of the training: model, optimizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass

from settings import kinds
from settings.models import IMAGE_MODELS, MODEL_NAMES, OPTIONS, TEXT_MODELS
from settings.setting import of_group

OPTIMIZERS = {  # what each keeps of a parameter, by torch's names: momentum.NAME rounds one of them
    "sgd": ("momentum_buffer",),  # where there is a momentum
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "collage": ("exp_avg", "exp_avg_sq", "weight_rest", "exp_avg_sq_rest"),  # AdamW in bfloat16, of pairs
    "muon": ("momentum_buffer", "exp_avg", "exp_avg_sq"),  # of hidden matrices; the others are AdamW's
}
BETAS = (0.9, 0.999)  # torch's own of Adam and AdamW, and Collage's

setting = of_group("training")


@dataclass(frozen=True)
class TrainingSettings:
    """What learns, and how."""

    model: str | None = setting(
        None,
        kinds.or_none(kinds.name_or_function(MODEL_NAMES, ("models", "MODELS"))),
        f"model; {', '.join(IMAGE_MODELS)} need images, {', '.join(TEXT_MODELS)} a text",
        default_text="the data set's own",
    )
    model_options: str | None = setting(
        None,
        kinds.or_none(OPTIONS),
        "what the model is like, as layers=4,heads=4,width=128,context=64,dropout=0; context: characters of a window of"
        " text",
        default_text="those of its function",
    )
    epochs: int = setting(2, kinds.whole(0), "passes over the training rows")
    steps: int | None = setting(
        None, kinds.or_none(kinds.whole(0)), "so many steps, in place of --epochs", default_text="those of the epochs"
    )
    evaluate_every: int | None = setting(
        None,
        kinds.or_none(kinds.whole(1)),
        "steps from one evaluation, which is a line of metrics.jsonl, to the next; the last step has one too",
        default_text="an epoch; with --steps, at the end alone",
    )
    batch_size: int = setting(256, kinds.whole(1), "rows in a step")
    micro_batch: int | None = setting(
        None,
        kinds.or_none(kinds.whole(1)),
        "rows that pass through the model at once; their gradients are added until the step has its batch",
        default_text="the whole batch",
    )
    optimizer: str = setting("sgd", kinds.name_or_function(OPTIMIZERS), "optimizer")
    learning_rate: float = setting(0.01, kinds.POSITIVE, "learning rate; its peak, where there is a schedule")
    momentum: float = setting(0.0, kinds.NOT_NEGATIVE, "momentum of sgd")
    betas: tuple[float, float] | None = setting(
        None,
        kinds.or_none(kinds.BETAS),
        "how slowly the two moments of Adam forget; not with sgd",
        default_text="0.9,0.999",
    )
    weight_decay: float = setting(0.0, kinds.NOT_NEGATIVE, "weight decay, as the optimizer defines it")
    decay: str = setting(
        "all",
        kinds.one_of("all", "matrices"),
        "what weight decay is for; matrices: the parameters of two dimensions or more, embeddings among them",
    )
    clip_norm: float | None = setting(
        None,
        kinds.or_none(kinds.POSITIVE),
        "the largest norm of the gradients of all parameters together, to which longer ones are shortened",
        default_text="none",
    )
    schedule: str = setting(
        "constant",
        kinds.one_of("constant", "cosine", "onecycle"),
        "learning rate over the steps of the run",
    )
    warmup: int = setting(0, kinds.whole(0), "steps in which the learning rate rises to its peak; not with onecycle")
    final_learning_rate: float = setting(
        0.0, kinds.NOT_NEGATIVE, "where cosine ends, from the end of the warmup to the last step"
    )
    average_last: float = setting(
        0.0,
        kinds.number("a fraction, 0 <= f <= 1", lambda f: 0 <= f <= 1),
        "share of the evaluations (epochs), the last ones, at which the weights are averaged in float32; the average is"
        " tested at the end",
    )
    seed: int = setting(42, kinds.SEED, "split, initial weights, order of the rows, and rounding noise")
    device: str = setting("auto", kinds.one_of("auto", "cpu", "cuda"), "where to compute; auto: cuda if there")
