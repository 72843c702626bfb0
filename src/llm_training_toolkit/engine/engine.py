"""Engine: forward, backward and update of one optimizer step, through DeepSpeed.

The loop passes micro-batches and a learning rate. DeepSpeed's loss rescaling, batch arithmetic and schedulers are kept
out of the result, all in `forward_backward` and `optim_step`. At ZeRO 2 and 3 DeepSpeed reduces gradients and holds the
master weights; at ZeRO 0 and 1 `MasterWeights` and `ShardedMasterWeights` do, and DeepSpeed runs the passes alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from llm_training_toolkit.config.schema import Offload, OptimConfig
from llm_training_toolkit.data.collate import MicroBatch
from llm_training_toolkit.distributed.column_slice import ColumnSlice
from llm_training_toolkit.distributed.tensor_group import get_all_ranks
from llm_training_toolkit.engine.allocation import allocate_zeros, keep_freed_memory
from llm_training_toolkit.engine.fragments import MOMENTS, Fragment, locate_fragments, sync_low_precision_weights
from llm_training_toolkit.engine.gradient_buffer import MasterPiece
from llm_training_toolkit.engine.master_weights import MasterWeights
from llm_training_toolkit.engine.sharded_master_weights import ShardedMasterWeights
from llm_training_toolkit.engine.skip_step import SkippableOptimizer
from llm_training_toolkit.models import LossModule


class Engine:
    """Model under DeepSpeed, with AdamW in fp32 and gradients that do not depend on how a batch is split."""

    def __init__(
        self,
        module: LossModule,
        optim: OptimConfig,
        deepspeed_config: Mapping[str, Any],
        device: torch.device,
        *,
        zero_stage: int,
        offload: Offload = "none",
    ) -> None:
        import deepspeed  # noqa: PLC0415 - heavy, and only after prepare_deepspeed

        if device.type == "cpu":
            keep_freed_memory()
        self.device = device
        self._batch_position = module.batch_position
        self._router_monitor = module.router_monitor
        self._sequence_group = module.sequence_group
        self.stage = zero_stage
        self._names = {
            id(parameter): name.removeprefix("lm.")
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._tensor_parallel = tensor = module.tensor_parallel
        self._peers = tensor.group.data_parallel if tensor is not None else get_all_ranks()
        self.shapes = {
            self._names[id(each)]: tuple(getattr(each, "ds_shape", each.shape))
            if tensor is None
            else tensor.get_whole_shape(each)
            for each in trained
        }
        """Shape of each trainable parameter, whole."""
        self.column_parts = {} if tensor is None else tensor.count_column_parts(trained, self._names)
        """Slices of each parameter whose columns are cut over ranks, which a checkpoint stores by themselves."""
        self._max_grad_norm = optim.max_grad_norm
        sent = torch.bfloat16 if deepspeed_config["communication_data_type"] == "bf16" else torch.float32
        self._master_weights: MasterWeights | ShardedMasterWeights | None = None
        if self.stage == 1:
            self._master_weights = ShardedMasterWeights(
                trained, device, self._peers, tensor, offload=offload != "none", sent=sent
            )
        if self.stage <= 1:
            module.to(device)  # DeepSpeed would move it only after the fp32 copies are made
        if self.stage == 0:
            self._master_weights = MasterWeights(trained, self._peers, tensor, sent=sent)
        self.optimizer = _build_adamw(module, self._names, optim, device, self._master_weights)
        deepspeed.init_distributed(dist_init_required=False)  # reuses the existing process group
        self.deepspeed, self._zero_optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=dict(deepspeed_config), dist_init_required=False
        )
        if self._master_weights is not None:
            self.deepspeed.enable_backward_allreduce = False
            if tensor is not None:
                tensor.broadcast_slices(trained)
            self._master_weights.load_from_low_precision()  # DeepSpeed has broadcast rank 0's whole weights
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.forward_seconds = 0.0
        """Seconds of this rank's forward passes in the last `forward_backward`: its own work, before it waits for the
        others. Under ZeRO 3 the wait for their weights is included.
        """
        self._skippable_optimizer = SkippableOptimizer(self.optimizer)
        self.create_optimizer_state(num_updates=0)

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_tokens: int,
        on_micro_batch_start: Callable[[int], None] | None = None,
    ) -> float:
        """Accumulate the gradients of this rank's micro-batches and return the sum of its token losses.

        A balance loss adds to the gradients, but not to this sum.

        `loss_tokens` counts the loss tokens of the global batch; `on_micro_batch_start` is called with the index of
        each micro-batch before it runs. Every rank must pass the same number of micro-batches. From ZeRO 2 on
        DeepSpeed averages gradients over ranks: the factor `world_size` undoes that, and `scale_wrt_gas=False`
        prevents division by the accumulation steps. Forgetting either raises no error.
        """
        self.deepspeed.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if self._router_monitor is not None:
            self._router_monitor.reset(self.device)
        stopwatch = DeviceTimer(self.device)
        scale = (1 if self._master_weights is not None else self.world_size) / max(loss_tokens, 1)
        for index, batch in enumerate(micro_batches):
            if on_micro_batch_start is not None:
                on_micro_batch_start(index)
            self.deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            self._batch_position.step, self._batch_position.first = batch.step, batch.first
            with stopwatch, record_function("forward"):
                loss = self._run_forward(batch)
            total += loss.detach()
            with record_function("backward"):
                self.deepspeed.backward(loss * scale, scale_wrt_gas=False)
        if self._master_weights is not None:
            self._master_weights.reduce_gradients()
        if self._router_monitor is not None:
            total -= self._router_monitor.get_balance_sum()
        summed = float(total)  # waits for the device, so that the timer's events are complete
        self.forward_seconds = stopwatch.total_seconds()
        return self._count_once(summed)

    def run_trial_pass(self, batch: MicroBatch) -> None:
        """Run a micro-batch for its memory alone, before the first ones of a step. Collective.

        Its loss is multiplied by 0, so that it adds nothing to the gradients of that step.
        """
        self.deepspeed.train()
        self.deepspeed.set_gradient_accumulation_boundary(is_boundary=False)
        self._batch_position.step, self._batch_position.first = batch.step, batch.first
        self.deepspeed.backward(self._run_forward(batch) * 0.0, scale_wrt_gas=False)

    def compute_router_statistics(self, loss_tokens: int) -> dict[str, float]:
        """Return metrics of the routers in the last `forward_backward`, over all ranks; empty for a dense model.

        Collective. `loss_tokens` counts the loss tokens of the global batch.
        """
        return {} if self._router_monitor is None else self._router_monitor.compute_statistics(loss_tokens)

    def _run_forward(self, batch: MicroBatch) -> Tensor:
        tokens = [batch.input_ids, batch.position_ids, batch.labels]
        if self._sequence_group is not None:  # labels are shifted already, so that a slice ends with its next token
            tokens = [self._sequence_group.take_slice(tensor) for tensor in tokens]
        # Page-locked rows are copied while the device still computes; for others the flag changes nothing.
        moved = (tensor.to(self.device, non_blocking=True) for tensor in (*tokens, batch.cu_seqlens))
        loss: Tensor = self.deepspeed(*moved, batch.max_seqlen)
        return loss

    @torch.no_grad()
    def compute_loss_sum(self, batch: MicroBatch) -> float:
        """Return the sum of a batch's token losses, without gradients. Collective under ZeRO 3."""
        self.deepspeed.eval()
        return self._count_once(float(self._run_forward(batch)))

    def _count_once(self, loss_sum: float) -> float:
        """Return a loss on one rank of each tensor-parallel group, on the others 0: all of them have it whole."""
        return loss_sum if self._tensor_parallel is None or self._tensor_parallel.group.index == 0 else 0.0

    def optim_step(self, lr: float, should_update: Callable[[float], bool] | None = None) -> float:
        """Update the weights with the accumulated gradients and return the gradient norm before clipping.

        Every rank calls `should_update` once with that norm, in the same order. If it returns False, weights and
        moments stay unchanged, bit for bit. Non-finite gradients skip the update, possibly without a call of
        `should_update`, and make the returned norm non-finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        master_grad_norm: float | None = None
        if self._master_weights is not None:
            master_grad_norm = self._master_weights.compute_grad_norm()
            self._master_weights.clip_gradients(self.optimizer, master_grad_norm, self._max_grad_norm)

        def get_grad_norm() -> float:
            return float(master_grad_norm if master_grad_norm is not None else self._zero_optimizer._global_grad_norm)  # noqa: SLF001

        self._skippable_optimizer.set_update_condition(
            lambda: math.isfinite(get_grad_norm()) and (should_update is None or should_update(get_grad_norm()))
        )
        with record_function("update weights"):
            self.deepspeed.step()
            if self._master_weights is not None:
                self._master_weights.sync_low_precision()
        return get_grad_norm() if self.deepspeed.was_step_applied() else float("nan")

    def get_full_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the fp32 gradient after `forward_backward`, or None where DeepSpeed has it: ZeRO 2, 3. Collective."""
        if self._master_weights is None:
            return None
        gradient = self._master_weights.get_gradient(parameter)
        if gradient is None or self._tensor_parallel is None:
            return gradient
        return self._tensor_parallel.gather_whole(parameter, gradient)

    def local_fragments(self) -> list[Fragment]:
        """Return the fragments on this rank; at ZeRO 0 every parameter, whole."""
        if self._master_weights is not None:
            return [self._build_fragment(piece) for piece in self._master_weights.pieces]
        return list(locate_fragments(self._zero_optimizer, self._names, self.stage, self.rank))

    def owned_fragments(self) -> list[Fragment]:
        """Return the fragments that this rank saves; over all ranks each weight occurs exactly once."""
        if self._master_weights is None:
            return self.local_fragments()
        tensor = self._tensor_parallel
        owned = [each for each in self._master_weights.pieces if tensor is None or tensor.is_owner(each.parameter)]
        chosen = owned[self._peers.index :: self._peers.size] if self.stage == 0 else owned
        return [self._build_fragment(piece) for piece in chosen]

    def _build_fragment(self, piece: MasterPiece) -> Fragment:
        """Return the fragment of a piece: rows of a matrix are a range of the whole one, columns a slice by itself."""
        name, start = self._names[id(piece.parameter)], piece.start
        part = None if self._tensor_parallel is None else self._tensor_parallel.get_slice(piece.parameter)
        columns = None if part is None or part.dim == 0 else ColumnSlice(name, part.index, part.parts)
        if part is not None and part.dim == 0:
            start += part.index * piece.parameter.numel()
        stored = name if columns is None else columns.name
        return Fragment(stored, start, piece.weights.numel(), piece.weights, 0, columns)

    def create_optimizer_state(self, num_updates: int) -> None:
        """Create the optimizer state to load into, as after `num_updates` updates; the previous state is dropped.

        Each flat tensor gets its own step counter. A shared one would advance once per tensor, which silently wrecks
        Adam's bias correction (DeepSpeed's universal loading does this).
        """
        self.optimizer.state.clear()
        flat_parameters = list({id(piece.flat): piece.flat for piece in self.local_fragments()}.values())
        shapes = [flat.shape for flat in flat_parameters]
        home = flat_parameters[0].device if flat_parameters else self.device  # host memory with offload
        moments = {key: allocate_zeros(shapes, torch.float32, home)[1] for key in MOMENTS}
        for index, flat in enumerate(flat_parameters):
            step_device = flat.device if self.optimizer.defaults["fused"] else torch.device("cpu")
            self.optimizer.state[flat] = {
                "step": torch.tensor(float(num_updates), dtype=torch.float32, device=step_device),
                **{key: moments[key][index] for key in MOMENTS},
            }

    def sync_low_precision(self) -> None:
        """Update the forward pass's weights after writes to fragments. Collective."""
        if self._master_weights is not None:
            self._master_weights.sync_low_precision()
        else:
            sync_low_precision_weights(self._zero_optimizer, self.stage)

    def peak_memory_gb(self) -> float:
        """Return the peak device memory so far in GB; on CPU the peak resident size of this process."""
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device)) / 1e9
        import resource  # noqa: PLC0415 - POSIX only

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024 / 1e9

    def close(self) -> None:
        """Release the hooks and buffers of DeepSpeed and of the master weights."""
        if self._master_weights is not None:
            self._master_weights.close()
        self.deepspeed.destroy()


def _build_adamw(
    module: nn.Module,
    names: Mapping[int, str],
    optim: OptimConfig,
    device: torch.device,
    master: MasterWeights | ShardedMasterWeights | None,
) -> torch.optim.AdamW:
    """Build AdamW; weight decay applies to matrices, but not to norms, biases and learned positions."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
            updated = [parameter] if master is None else master.get_master_weights(parameter)
            (decay if is_matrix and ".wpe." not in names[id(parameter)] else no_decay).extend(updated)
    if not decay and not no_decay:
        no_decay = [nn.Parameter(torch.zeros(0))]  # a shard of padding alone; torch refuses an empty optimizer
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    # The fused kernel reads and writes each value once: torch's fastest on CPU and GPU.
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,  # set by `optim_step`; zero until then, so that a step DeepSpeed takes on its own changes nothing
        betas=optim.betas,
        eps=optim.eps,
        fused=device.type in {"cpu", "cuda"},
    )


class DeviceTimer:
    """Timer of the work inside `with`. Read `total_seconds` once the device has finished that work."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._started_at = self._total = 0.0

    def __enter__(self) -> Self:
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._spans.append((begin, end))
            self._spans[-1][0].record()
        else:
            self._started_at = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_gpu:
            self._spans[-1][1].record()
        else:
            self._total += time.perf_counter() - self._started_at

    def total_seconds(self) -> float:
        """Return the sum so far."""
        milliseconds = sum(float(begin.elapsed_time(end)) for begin, end in self._spans)
        return self._total + milliseconds / 1e3
