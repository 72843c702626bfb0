"""One rank loads weights as a worker does, and says what that took of its memory.

Arguments: the directory of the weights, the ZeRO stage.
"""

from __future__ import annotations

import json
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.node_group import form_node_group
from llm_training_toolkit.engine import prepare_deepspeed, zero3_init
from llm_training_toolkit.models import build_model, check_pretrained_weights
from llm_training_toolkit.models.weight_stream import WeightStream

PATH, STAGE = sys.argv[1], int(sys.argv[2])
SECONDS = 0.002
"""Between two looks at the memory: a layer of the benchmark's model takes several times as long."""


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own, and pages of files it has mapped, which the system may drop."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {words[0]: int(words[1]) * 1024 for words in lines if words[0] in {"RssAnon:", "RssFile:"}}
    return {"own": found["RssAnon:"], "mapped": found["RssFile:"]}


class Watch(threading.Thread):
    """The most memory since it was started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = resident()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(SECONDS):
            self.most = {key: max(self.most[key], value) for key, value in resident().items()}


def main() -> None:
    """Load, and print the most and the rest of every rank on rank 0."""
    config = json.loads((Path(PATH) / "config.json").read_text())
    torch.set_num_threads(1)
    prepare_deepspeed("cpu")
    dist.init_process_group("gloo")
    check_pretrained_weights(PATH, config["model_type"])  # what it imports is no part of what is loaded
    watch = Watch()
    watch.start()
    deepspeed = {
        "zero_optimization": {"stage": STAGE},
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
    }
    context = RunContext(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    with form_node_group(context, "this machine") as node, zero3_init(deepspeed):
        streamed = WeightStream(PATH, context, node) if STAGE < 3 else nullcontext()
        with streamed as stream:
            model = build_model(config, precision="bf16", attention="sdpa", path=PATH, stream=stream)
    watch.over.set()
    watch.join()
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    mine = {f"{key} most": watch.most[key] - watch.before[key] for key in watch.most}
    mine["own after"] = resident()["own"] - watch.before["own"]
    every: list[dict[str, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    if dist.get_rank() == 0:
        print(json.dumps({"bytes": 2 * count, "ranks": every}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
