"""Problems of a run's horizon: its length, and the tokenizer of its prepared data."""

from __future__ import annotations

from llm_training_toolkit.config.schema import Config, ProfileConfig
from llm_training_toolkit.plan.problem import Problem


def find_length_problems(steps: int | None, warmup: int | None, decay: int | None) -> tuple[Problem, ...]:
    """Return problems with the length of the run, as far as it is known."""
    if steps is None or warmup is None or decay is None:
        return ()
    if steps == 0:
        return (
            Problem(
                "no-training-sequences",
                "data.sources",
                "there is no training sequence",
                "Check the paths and data.eval.fraction",
            ),
        )
    if warmup > steps:
        what = f"a warm-up of {warmup} steps is longer than the run of {steps}"
        return (Problem("warmup-too-long", "optim.warmup", what, "Use a share such as 0.01, or a longer run"),)
    if warmup + decay > steps:
        what = f"a warm-up of {warmup} steps and a decay of {decay} do not fit into {steps} steps"
        return (Problem("decay-too-long", "optim.decay", what, "Lower optim.decay or optim.warmup"),)
    return ()


def find_profile_problems(profile: ProfileConfig | None, steps: int | None) -> tuple[Problem, ...]:
    """Return problems with the steps to profile in a run of `steps` steps, None while that is not known."""
    if profile is None:
        return ()
    first, last = profile.steps
    if first > last:
        what = f"the first step, {first}, comes after the last one, {last}"
        return (Problem("profile-steps-reversed", "profile.steps", what, f"Write [{last}, {first}]"),)
    if steps is not None and last > steps:
        what = f"step {last} lies beyond the end of the run, which has {steps} steps"
        return (Problem("profile-beyond-end", "profile.steps", what, f"Give steps from 1 to {steps}"),)
    return ()


def find_vocabulary_problems(config: Config, vocab_size: int | None, embedding_rows: int) -> tuple[Problem, ...]:
    """Return a problem if the tokenizer has more entries (None = not known yet) than the embedding has rows."""
    if vocab_size is None or vocab_size <= embedding_rows:
        return ()
    what = f"the tokenizer has {vocab_size:,} entries, the model's embedding {embedding_rows:,} rows"
    key = "model.resize_vocab_to" if config.model.path is not None else "model.config_overrides.vocab_size"
    fix = f"Give the tokenizer of this model, or let the embedding have more: {key}={-(-vocab_size // 64) * 64}"
    return (Problem("tokenizer-too-large", "tokenizer.path", what, fix),)
