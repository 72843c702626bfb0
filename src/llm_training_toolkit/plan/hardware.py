"""The hardware of a cluster: devices, links, price. What a cluster file must say for planning, and nothing more."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from llm_training_toolkit.config.schema import ConfigSection

Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Number = Annotated[int, Field(ge=1)]


class DeviceSpeed(ConfigSection):
    """What a device is sold with, dense products, in 10^12 operations per second. Sparse figures are twice too high."""

    bf16: Positive
    """With sums in fp32."""
    fp32: Positive
    """Without TF32, which torch does not use unless it is told to."""


class LinkBandwidth(ConfigSection):
    """In 10^9 bytes per second, one direction."""

    within_node: Amount
    """Between two devices of a node; 0 where a node has one."""
    between_nodes: Amount
    """Of a node, all its devices together; 0 where there is one node."""
    storage: Positive
    """What the cluster writes to the shared storage, all nodes together."""


class HourlyPrice(ConfigSection):
    """In US dollars for an hour."""

    node: Amount
    """Of one node with devices."""
    head: Amount
    """Of the node that only leads; 0 where it is one of the others."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    """The day it was looked up, as a text: Ray turns a cluster file into JSON, which has no dates."""


class ClusterHardware(ConfigSection):
    """The nodes with devices that a cluster has at its largest. The head counts where it carries devices."""

    nodes: Number
    """The most there can be."""
    device: Annotated[str, Field(min_length=1)]
    """What a worker computes on: the name of a GPU, or `cpu`, where every core is a device."""
    devices_per_node: Number
    memory_gb: Positive
    """Of a device, in 10^9 bytes; of a core, its share of the machine's."""
    cpus: Number
    """Of a node, as Ray counts them."""
    tflops: DeviceSpeed
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.34
    """The share of `tflops` that training reaches; better than the default is what a run of one's own has reached.

    The default is an assumption. torchtitan publishes 5,762 tokens/s a GPU for Llama 3.1 8B in sequences of 8,192, with
    FSDP and without torch.compile on 8 H100 (benchmarks/llama3_h100_202412_torchtitan.md): at 5.79e10 FLOPs a token, as
    `families.flops_per_token` counts, 0.34 of 989e12. LLM Foundry publishes 0.46 for 7B on 8 H100
    (scripts/train/benchmarking/README.md). Models below 1B, short sequences and slow links reach less.
    """
    bandwidth_gb_per_s: LinkBandwidth
    price_per_hour: HourlyPrice
    spot: bool
    """Whether the provider may take the nodes away."""
    shared_storage: Annotated[str, Field(min_length=1)]
    """A path that every node sees, for `run.dir`."""

    @model_validator(mode="after")
    def _check_cpu_devices(self) -> ClusterHardware:
        if self.is_cpu and self.devices_per_node != self.cpus:
            raise ValueError("on cpu every core is a device: devices_per_node and cpus must be the same number")
        return self

    @model_validator(mode="after")
    def _check_link_bandwidths(self) -> ClusterHardware:
        links = self.bandwidth_gb_per_s
        if self.devices_per_node > 1 and not links.within_node:
            raise ValueError("bandwidth_gb_per_s.within_node = 0 with several devices in a node")
        if self.nodes > 1 and not links.between_nodes:
            raise ValueError("bandwidth_gb_per_s.between_nodes = 0 with several nodes")
        return self

    @property
    def is_cpu(self) -> bool:
        """Whether the devices are the cores themselves."""
        return self.device == "cpu"

    def get_workers_per_node(self, cpus_per_worker: int) -> int:
        """How many workers of `cpus_per_worker` cores and one device a node holds; on `cpu` the cores are it."""
        by_cores = self.cpus // cpus_per_worker
        return by_cores if self.is_cpu else min(self.devices_per_node, by_cores)

    def get_devices_per_worker(self, cpus_per_worker: int) -> int:
        """One GPU, or the cores of a worker."""
        return cpus_per_worker if self.is_cpu else 1

    def get_achieved_flops(self, precision: str) -> float:
        """Operations per second that a device reaches in training."""
        return 1e12 * self.utilisation * (self.tflops.bf16 if precision == "bf16" else self.tflops.fp32)
