"""`ltt prepare`: documents of a run to packed tokens in the cache."""

from __future__ import annotations

from llm_training_toolkit.config import Config
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.data.prepare.epochs import prepare_epochs
from llm_training_toolkit.launch.backend import create_dataset_builder
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.setup.hub_weights import ask_for_size
from llm_training_toolkit.setup.stored_plan import recall_stored_plan


def prepare_dataset(config: Config, console: Console, *, verify: bool = False) -> DatasetInfo:
    """Prepare the data of a run unless the cache has it; `verify` rereads the documents. Raises ToolkitError."""
    config = recall_stored_plan(config)
    ask_for_size(config, console.print_line)
    builder = create_dataset_builder(config, console)
    if builder.partition_note is not None:
        console.print_line(builder.partition_note)
    dataset_info = prepare_epochs(builder, config).dataset_info
    if verify:
        builder.verify_documents()
    return dataset_info
