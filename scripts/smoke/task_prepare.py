"""The data of all runs, prepared once into their common cache."""

from __future__ import annotations

from llm_training_toolkit.config import parse_config
from llm_training_toolkit.data.prepare.epochs import prepare_run_data
from smoke.task import Values, run


def prepare(arguments: Values) -> Values:
    """Prepare the data of `config`, the run that needs most of it."""
    dataset_info = prepare_run_data(
        parse_config(arguments["config"], "gpu smoke"), lambda _stage, _done, _total: None
    ).dataset_info
    return {
        "sequences": dataset_info.total_sequences,
        "documents": sum(source.documents for source in dataset_info.sources),
    }


if __name__ == "__main__":
    run(prepare)
