"""Closed-form estimate of host memory: while a model is built, while a worker trains, and of a checkpoint's copy."""

from __future__ import annotations

from llm_training_toolkit.plan.memory.memory_estimate import DeviceWorkload

LOADING_CHUNK_BYTES = 1 << 26  # 67 MB: what a rank holds in host memory of pretrained weights on the way to a GPU


def estimate_host_bytes(load: DeviceWorkload) -> int:
    """Estimate the host memory that one worker takes while it trains, beside its device's, in bytes.

    A checkpoint's copy takes it in every run. With `engine.offload` fp32 weights, Adam's moments and the gradients of
    the update are 16 bytes a trained weight of the partition. At stage 3 DeepSpeed 0.19.8 keeps the gradients summed
    over micro-batches beside them (`grad_partitions_flat_buffer` of stage3.py): 20 bytes. Stage 1 rounds the weights to
    bf16 there, 2 bytes. `optimizer_and_weights` adds the partition of all weights in the forward pass's precision.
    """
    copy = compute_checkpoint_copy_bytes(load.trainable_parameters, load.workers)
    if load.offload == "none":
        return copy
    each = 20 if load.zero == 3 else 18 if load.precision == "bf16" else 16
    state = copy + each * load.compute_partition_size(load.trainable_parameters, spread=True)
    if load.offload == "optimizer":
        return state
    total = load.model.total_parameters + (load.adapter.trainable_parameters if load.adapter else 0)
    return state + load.bytes_per_value * load.compute_partition_size(total, spread=True)


def estimate_loading_bytes(load: DeviceWorkload) -> int:
    """Estimate the host memory that one worker takes while it builds the model, beside its device's, in bytes.

    Adapters load their base at each start, below stage 3 by chunks on the way to the GPU. Other runs pass one tensor at
    a time: a new one draws it in fp32. It is an upper bound for one that begins with weights, which takes a chunk then,
    and a tensor in its own precision when it resumes. Pages of files that rank 0 maps at stage 3 are the system's to
    drop.
    """
    if load.adapter is not None and load.zero < 3:
        return LOADING_CHUNK_BYTES
    return 4 * load.model.largest_tensor


def estimate_peak_host_bytes(load: DeviceWorkload) -> int:
    """Estimate the most host memory that one worker takes beside its device's, in bytes.

    Loading ends before training begins.
    """
    return max(estimate_host_bytes(load), estimate_loading_bytes(load))


def compute_checkpoint_copy_bytes(parameters: int, workers: int) -> int:
    """Return the bytes of host memory that a worker's copy takes while a checkpoint is written.

    Trained parameters have 12 bytes each, fp32 weights and Adam's two moments. The workers save equal shares at every
    stage; of those with slices of the same matrices the first saves the most, for which this counts.
    """
    return -(-12 * parameters // workers)
