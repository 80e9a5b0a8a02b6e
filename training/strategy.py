"""On which hardware and how: the only file that sets up DDP, FSDP, compiled blocks and precision.

It builds the Trainer. One process trains alone. Several run DDP, each with a whole copy of the model, or FSDP2
(Lightning's ModelParallelStrategy), where blocks are sharded over all ranks (fsdp) or over groups that mirror each
other (hybrid); gloo on CPUs, NCCL on GPUs. bf16 means autocast with float32 master weights; weights, moments and
average stay float32.
Which of these a run takes is decided by `training.budget` unless the settings say so.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pytorch_lightning as pl
import torch
from torch import nn

from musicgen.errors import UserError
from musicgen.lm import MusicLM
from musicgen.packing import cpu_multiplies_bf16
from training.budget import Plan
from training.traffic import Traffic

if TYPE_CHECKING:
    from training.launch import Launched

log = logging.getLogger(__name__)


TEXT_MULTIPLE = 32  # tokens: compiled blocks hear captions of few lengths, since each takes a graph of its own
GRAPHS = 64  # of a compiled block; beyond its limit (8 unless raised) dynamo goes on uncompiled, with a warning at most


@dataclass(frozen=True)
class HardwareConfig:
    """Where a run computes.

    Args:
        accelerator: `auto` takes a GPU when there is one.
        devices: processes (and GPUs) per node.
        nodes: machines.
        precision: `bf16` is autocast with float32 master weights; `auto` takes it on GPUs and on x86 processors
            that multiply bf16, and float32 elsewhere, where it is emulated at a fraction of the speed.
        threads: CPU threads per process; 0 leaves torch's choice.
        strategy: `ddp` copies the model to every rank, `fsdp` shards it over all, `hybrid` over groups of ranks;
            `auto` takes what the plan says.
        shard_group: ranks that share one copy under `hybrid`; 0 takes the ranks of a node.
        checkpointing: what is recomputed in the backward pass: `none`; `selective` all but matrix products and
            attention; `full` whole blocks; `auto` what takes the least time per step.
        compile: compile each block, and the loss on a GPU; `auto` does so on GPUs.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    nodes: int = 1
    precision: Literal["auto", "bf16", "float32"] = "auto"
    threads: int = 0
    strategy: Literal["auto", "ddp", "fsdp", "hybrid"] = "auto"
    shard_group: int = 0
    checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        for name, least in (("devices", 1), ("nodes", 1), ("threads", 0), ("shard_group", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"hardware.{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.devices * self.nodes

    @property
    def uses_gpu(self) -> bool:
        """Whether the run goes to GPUs."""
        return self.accelerator == "gpu" or (self.accelerator == "auto" and torch.cuda.is_available())

    @property
    def number_format(self) -> Literal["bf16", "float32"]:
        """The precision that a run computes in."""
        if self.precision != "auto":
            return self.precision
        return "bf16" if self.uses_gpu or cpu_multiplies_bf16() else "float32"

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled."""
        return self.compile == "on" or (self.compile == "auto" and self.uses_gpu and has_compiler())


def has_compiler() -> bool:
    """Whether there is a C compiler, without which torch.compile and Triton cannot start a kernel of theirs."""
    return any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "gcc", "clang", "cc"))


def check(config: HardwareConfig) -> None:
    """Raises `UserError` when GPUs were asked for that are not there; warns where nothing can be compiled for them."""
    if config.uses_gpu and config.compile == "auto" and not has_compiler():
        log.warning("there is no C compiler (gcc or clang): blocks are not compiled and train slower; install one")
    if config.uses_gpu and torch.cuda.device_count() < config.devices:
        raise UserError(
            f"hardware.devices is {config.devices}, but this machine shows {torch.cuda.device_count()} GPUs; "
            "lower it or set --hardware.accelerator cpu"
        )


def let_memory_grow(config: HardwareConfig, env: MutableMapping[str, str] = os.environ) -> None:
    """Let torch extend the memory it holds of a GPU instead of taking more pieces, unless the user has set how.

    Near the limit the pieces of one step may fit none of the next, and torch gives all back and asks anew. It reads
    this when it first touches a GPU.
    """
    if config.uses_gpu and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & env.keys():
        env["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def build_trainer(
    config: HardwareConfig,
    plan: Plan,
    *,
    steps: int,
    callbacks: Sequence[pl.Callback],
    launched: Launched,
    logger: Any = None,
) -> pl.Trainer:
    """A Trainer that makes `steps` steps; checkpoints and bar are ours, so Lightning's own are off."""
    strategy: Any = "auto"
    if plan.strategy == "ddp":
        strategy = _DDP(
            launched.device, process_group_backend=process_group_backend(config), gradient_as_bucket_view=True
        )
    elif plan.strategy in ("fsdp", "hybrid"):
        strategy = _FSDP2(
            launched.device,
            data_parallel_size=config.world,
            tensor_parallel_size=1,
            process_group_backend=process_group_backend(config),
        )
    return _trainer(config, strategy, steps, plan.accumulate, callbacks, launched, logger)


class _OnGivenDevice:
    """A strategy on the device that a launcher gave this process; without one, that of its local rank."""

    def __init__(self, device: torch.device | None, **options: Any) -> None:
        super().__init__(**options)
        self._device = device

    @property
    def root_device(self) -> torch.device:
        strategy: Any = super()
        return self._device or strategy.root_device


class _DDP(_OnGivenDevice, pl.strategies.DDPStrategy):
    """Lightning's DDP, made in the queue of a GPU that training computes in.

    Made in a queue of its own, as Lightning does it, all gradients are summed there for good (torch warns of it:
    "AccumulateGrad node's stream does not match"), and one that `training.copies` has begun in the queue of computing
    could be read there after its memory has been given to another.
    """

    def _setup_model(self, model: nn.Module) -> nn.parallel.DistributedDataParallel:
        return nn.parallel.DistributedDataParallel(model, self.determine_ddp_device_ids(), **self._ddp_kwargs)


class _FSDP2(_OnGivenDevice, pl.strategies.ModelParallelStrategy):
    """Lightning's FSDP2; Ray has a strategy class of its own for DDP and FSDP1, and none for this."""


def build_codec_trainer(
    config: HardwareConfig, *, steps: int, callbacks: Sequence[pl.Callback], launched: Launched
) -> pl.Trainer:
    """A Trainer of the codec: alone, or DDP with each rank holding codec and discriminator."""
    strategy: Any = "auto"
    if config.world > 1:
        # The two are back-propagated one after the other; the codebooks are kept equal by sums of their own.
        strategy = pl.strategies.DDPStrategy(
            process_group_backend=process_group_backend(config), find_unused_parameters=True, broadcast_buffers=False
        )
    return _trainer(config, strategy, steps, 1, callbacks, launched, None)


def process_group_backend(config: HardwareConfig) -> str:
    """What processes talk by; states are written through the CPU's backend whatever the gradients travel by."""
    return "cpu:gloo,cuda:nccl" if config.uses_gpu else "gloo"


def _trainer(
    config: HardwareConfig,
    strategy: Any,
    steps: int,
    accumulate: int,
    callbacks: Sequence[pl.Callback],
    launched: Launched,
    logger: Any,
) -> pl.Trainer:
    if config.threads:
        torch.set_num_threads(config.threads)
    return pl.Trainer(
        accelerator="gpu" if config.uses_gpu else "cpu",
        devices=config.devices,
        num_nodes=config.nodes,
        precision="bf16-mixed" if config.number_format == "bf16" else "32-true",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        strategy=strategy,
        callbacks=list(callbacks),
        plugins=[launched.environment] if launched.environment is not None else None,
        logger=logger or False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )


def build_model(make: Callable[[], MusicLM], plan: Plan, rank: int) -> MusicLM:
    """The model as this rank starts with it: whole, or without storage where rank 0 will send its shards."""
    if plan.shards > 1 and rank > 0:
        with torch.device("meta"):
            return make()
    return make()


def prepare(lm: nn.Module, config: HardwareConfig, plan: Plan, device: torch.device, traffic: Traffic) -> None:
    """Recompute, compile and shard the blocks of `lm` in place; parameter names stay as they are.

    Called on every rank once processes talk to each other. Under sharding rank 0's weights are the ones that count, and
    `traffic` counts what is sent.
    """
    blocks: list[Any] = list(lm.transformer.layers)  # type: ignore[union-attr, arg-type]
    if config.compiles:
        _allow_graphs()
    for block in blocks:
        recompute(block, plan)
        if config.compiles:
            block.forward = torch.compile(block.forward, dynamic=False)
    if plan.shards > 1:
        _shard(lm, blocks, config, plan, device)
        traffic.watch(lm, blocks, copies=plan.shards < plan.ranks)


def _allow_graphs() -> None:
    """Let dynamo keep a graph for training, for validation and for each length of captions, and cut none of them.

    Under DDP it cuts where a bucket of gradients ends, which is inside a block, so that what could be one kernel is
    several. A block is a graph of its own here: gradients travel while the block before is computed.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, GRAPHS)  # type: ignore[attr-defined]
    config.optimize_ddp = False  # type: ignore[attr-defined]


def recompute(block: Any, plan: Plan) -> None:
    """Let a block make again in its backward pass what the plan does not keep."""
    if plan.checkpointing == "none":
        return
    draws = block.dropout > 0 or any(isinstance(m, nn.Dropout) and m.p > 0 for m in block.modules())
    kept = _kept_ops() if plan.checkpointing == "selective" else None
    # Set on the instance: a wrapping module would change the names of parameters and the step-wise path.
    block.forward = functools.partial(_checkpointed, block.forward, kept, draws)


def _checkpointed(forward: Any, kept: list[Any] | None, draws: bool, *inputs: Any) -> Any:
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    options: dict[str, Any] = {}
    if kept is not None:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, kept)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=draws, **options)


def _kept_ops() -> list[Any]:
    """What selective checkpointing keeps: results of matrix products and attention, dear to make again."""
    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]


def _shard(lm: Any, blocks: list[Any], config: HardwareConfig, plan: Plan, device: torch.device) -> None:
    """Shard, and give every rank its part of rank 0's weights."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    whole = {name: p.detach() for name, p in lm.named_parameters()} if not _is_meta(lm) else {}
    # On a CPU norms take no bf16 weights beside a float32 stream; autocast does the rest, and nothing is sent far.
    low = torch.bfloat16 if config.number_format == "bf16" and device.type != "cpu" else torch.float32
    shard_blocks(lm, blocks, mesh_of(plan, device.type), low)
    if _is_meta(lm):
        lm.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(lm, whole, options=options)


def mesh_of(plan: Plan, device_type: str) -> Any:
    """The ranks of a plan that shards: those that share a copy, and under hybrid sharding the copies beside them."""
    from torch.distributed.device_mesh import init_device_mesh

    copies = plan.ranks // plan.shards
    if copies > 1:
        return init_device_mesh(device_type, (copies, plan.shards), mesh_dim_names=("copies", "shards"))
    return init_device_mesh(device_type, (plan.shards,), mesh_dim_names=("shards",))


def shard_blocks(lm: Any, blocks: list[Any], mesh: Any, low: torch.dtype) -> None:
    """FSDP2: each block on its own, its weights gathered in `low`; embeddings, heads and norms with the root."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Blocks travel in bf16 and their gradients in float32; the residual stream between them keeps its type. The root's
    # one per cent stays float32, as autocast leaves embeddings.
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(lm, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    register_fsdp_forward_method(lm, "hidden")


def sum_mirrors(lm: nn.Module, *, now: bool) -> None:
    """Say of a model in hybrid shards whether its mirrors sum their gradients after the next backward pass; where not,
    these add up until they do. Nothing to do elsewhere."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(lm, FSDPModule):
        lm.set_requires_all_reduce(now)


def _is_meta(lm: nn.Module) -> bool:
    return any(p.is_meta for p in lm.parameters())


def is_sharded(lm: nn.Module) -> bool:
    """Whether this rank holds only its part of the weights."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in lm.parameters())


def forget_gathered(lm: nn.Module) -> None:
    """Drop gathered weights after they were changed behind FSDP's back; nothing to do elsewhere."""
    from torch.distributed.fsdp import FSDPModule

    for module in lm.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(value: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor that may be spread over ranks."""
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value


def number(value: Any) -> torch.Tensor:
    """A tensor that may be spread over ranks, as an ordinary one on each."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value
