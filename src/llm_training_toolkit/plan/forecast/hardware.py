"""Hardware of a cluster: the devices, links and prices that planning needs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from llm_training_toolkit.config.section import ConfigSection
from llm_training_toolkit.plan.forecast.device_peaks import find_device_peak
from llm_training_toolkit.plan.forecast.utilisation import DEFAULT_FLOPS_PER_BYTE

Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Number = Annotated[int, Field(ge=1)]


class DeviceSpeed(ConfigSection):
    """Datasheet speed of a device in dense products, 10^12 operations per second. Sparse figures are twice too high."""

    bf16: Positive
    """Speed in bf16 with fp32 accumulation."""
    fp32: Positive
    """Speed in fp32 without TF32, which torch uses only on request."""


class LinkBandwidth(ConfigSection):
    """Bandwidths in 10^9 bytes per second, one direction."""

    within_node: Amount
    """Between two devices of a node; 0 if a node has one."""
    between_nodes: Amount
    """Of a node, all its devices together; 0 if there is one node."""
    storage: Positive
    """Writes of the whole cluster to the shared storage."""


class HourlyPrice(ConfigSection):
    """Prices in US dollars per hour."""

    node: Amount
    """Price of one node with devices."""
    head: Amount
    """Price of a node that is only the head; 0 if the head is one of the others."""
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    """Date of the prices, as a string: Ray turns a cluster file into JSON, which has no dates."""


class ClusterHardware(ConfigSection):
    """Nodes with devices of a cluster at its largest. The head counts if it has devices."""

    nodes: Number
    """Maximum number of nodes."""
    device: Annotated[str, Field(min_length=1)]
    """Device of a worker: the name of a GPU, or `cpu`, where every core is a device."""
    devices_per_node: Number
    memory_gb: Positive
    """Memory of a device in 10^9 bytes; of a core its share of the machine's."""
    cpus: Number
    """CPUs of a node, as Ray counts them."""
    tflops: DeviceSpeed
    utilisation: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of `tflops` that training reaches, if measured; otherwise estimated (`plan/forecast/utilisation.py`)."""
    bandwidth_gb_per_s: LinkBandwidth
    price_per_hour: HourlyPrice
    spot: bool
    """Spot nodes, which the provider may preempt."""
    shared_storage: Annotated[str, Field(min_length=1)]
    """Path shared by all nodes, for `run.dir`."""

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
        """True if the devices are CPU cores."""
        return self.device == "cpu"

    def get_workers_per_node(self, cpus_per_worker: int) -> int:
        """Return the number of workers, of `cpus_per_worker` cores and one GPU unless on `cpu`, that a node holds."""
        by_cores = self.cpus // cpus_per_worker
        return by_cores if self.is_cpu else min(self.devices_per_node, by_cores)

    def get_devices_per_worker(self, cpus_per_worker: int) -> int:
        """Return 1 GPU, or the cores of a worker on `cpu`."""
        return cpus_per_worker if self.is_cpu else 1

    def get_peak_flops(self, precision: str) -> float:
        """Return the operations per second of a device's data sheet."""
        return 1e12 * (self.tflops.bf16 if precision == "bf16" else self.tflops.fp32)

    def get_flops_per_byte(self, precision: str) -> float:
        """Return the peak over the memory bandwidth, for numbers of two bytes."""
        known = find_device_peak(f"{self.device} {self.memory_gb:g}GB")  # as in the driver's name of an A100
        if known is None:
            return DEFAULT_FLOPS_PER_BYTE
        return self.get_peak_flops(precision) / (1e12 * known.bandwidth) * (1 if precision == "bf16" else 2)
