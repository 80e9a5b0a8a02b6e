"""The plan of a run before it starts: FLOP, memory by part, strategy, micro-batch, time, and what would not fit.

    make plan SIZE=3.3b GPUS=64 GPU=h100-80        (python -m training.budget --size 3.3b --gpus 64 --gpu h100-80)

Closed formulas over the model's shape; nothing is built and nothing is downloaded. A training run prints the same lines
for the hardware it finds and takes strategy, checkpointing and micro-batch from them where the settings say `auto`.

Model FLOP are counted by one rule, `FLOP_RULE`, printed beside every share of the peak (MFU): the widespread
6N + 12LdT charges full instead of causal attention and comes out about a fifth higher for the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from musicgen import patterns
from musicgen.config import SIZES, LMConfig
from musicgen.errors import UserError
from training.devices import DEVICES, GIB, Device, device_named, rate_of

FLOP_RULE = "3 x forward; matrix products of layers and heads, causal half of attention, no recompute, no text encoder"
TEXT_TOKENS = 32  # of a caption, where none is at hand to count
TRAFFIC_SHOWS = 1 / 3  # of computing: from here on weights are not sent between nodes
USABLE = 0.92  # of the memory: the rest goes to the CUDA context, workspaces and fragments

Strategy = Literal["single", "ddp", "fsdp", "hybrid"]
Checkpointing = Literal["none", "selective", "full"]
# Parameters of the frozen encoders in float32; others are left out and said so.
ENCODERS = {"minilm": 22.7e6, "t5-small": 35.3e6, "t5-base": 109.6e6, "t5-large": 334.9e6}


def positions(lm: LMConfig, frames: int) -> int:
    """Columns S that the model reads of a crop of T frames, by its codebook pattern."""
    columns = patterns.num_columns(frames, lm.num_codebooks, pattern=lm.pattern, tail=lm.tail)
    return columns - (lm.tail == "full")  # the last column of a whole layout is a target only


def prefix(lm: LMConfig) -> int:
    """Columns before those of the crop: a melody, and the caption where it does not enter by cross-attention."""
    return lm.condition.chroma_frames * lm.condition.melody + TEXT_TOKENS * (not lm.cross_attention)


def forward_flop(lm: LMConfig, frames: int, text_tokens: int = TEXT_TOKENS) -> dict[str, float]:
    """FLOP of the forward pass of one clip by part (a multiply-add counts two).

    Args:
        frames: T of the crop.
        text_tokens: L, tokens of its caption.
    """
    scored, d, n = positions(lm, frames), lm.dim, lm.num_layers
    s = scored + prefix(lm)
    per_position = 4 * d * d + 2 * lm.ffn_mult * d * d + (2 * d * d if lm.cross_attention else 0)
    cross = n * (4 * s * text_tokens * d + 4 * text_tokens * d * d) if lm.cross_attention else 0
    return {
        "linear": 2.0 * s * n * per_position,
        "self-attention": 2.0 * s * s * d * n,
        "cross-attention": float(cross),
        "heads": 2.0 * scored * lm.num_codebooks * lm.codebook_size * d,
    }


def train_flop(lm: LMConfig, frames: int, text_tokens: int = TEXT_TOKENS) -> float:
    """Model FLOP of one training clip by `FLOP_RULE`."""
    return 3 * sum(forward_flop(lm, frames, text_tokens).values())


def common_flop(lm: LMConfig, frames: int) -> float:
    """The same clip by the widespread (6N + 12LdT) T, for comparison with others' figures."""
    s = positions(lm, frames)
    return s * (6.0 * lm.num_parameters() + 12.0 * lm.num_layers * lm.dim * s)


def layer_activations(lm: LMConfig, frames: int, *, bf16: bool, cpu: bool, checkpointing: Checkpointing) -> float:
    """Bytes that one layer keeps of one clip for the backward pass.

    The residual stream and what the norms keep of it are float32; inputs of matrix products are bf16 under autocast.
    Per position and unit of width: norms 4 + 4 + 4 (their inputs); self-attention 1 in, 3 q/k/v, 1 out; cross-attention
    1 in, 1 query, 2 out (before and after the rows without text are erased); feed-forward 1 in, 4 + 4 around the
    activation. `selective` keeps what matrix products and attention put out, `full` the layer's input alone.
    """
    s, d, low = positions(lm, frames) + prefix(lm), lm.dim, 2 if bf16 else 4
    cross = 1 if lm.cross_attention else 0
    f = lm.ffn_mult
    if checkpointing == "full":
        return 4.0 * s * d
    if checkpointing == "selective":
        return s * d * (4.0 + low * (3 + 1 + 1 + cross * 3 + f + 1))
    kept = s * d * (4.0 * (2 + cross) + low * (1 + 3 + 1 + cross * 4 + 1 + 2 * f))
    if cpu and bf16:  # attention is written out there (musicgen.transformer.attend): its weights are kept
        kept += 2.0 * lm.num_heads * s * (s + cross * TEXT_TOKENS)
    return kept


@dataclass(frozen=True)
class Task:
    """What is to be trained, as far as the plan depends on it.

    Args:
        lm: the model's shape.
        batch: clips of the global batch.
        frames: T of a crop.
        steps: length of the run.
        bf16: autocast, else float32.
        moments: float32 numbers per parameter that the optimiser keeps.
        crop_seconds: length of a crop, for the words.
        adapter: parameters of an adapter, which alone are trained; 0 trains the model.
    """

    lm: LMConfig
    batch: int
    frames: int
    steps: int
    bf16: bool = True
    moments: int = 2
    crop_seconds: float = 30.0
    adapter: int = 0

    @property
    def trained(self) -> int:
        """Parameters that have a gradient, moments and an average."""
        return self.adapter or self.lm.num_parameters()

    @property
    def clip_flop(self) -> float:
        """Model FLOP of one training clip: `FLOP_RULE`, less the frozen weights' own gradients under an adapter."""
        return train_flop(self.lm, self.frames) * (2 / 3 if self.adapter else 1)


@dataclass(frozen=True)
class Plan:
    """How a task is laid out on some processors.

    Attributes:
        shards: ranks that share one copy of weights and optimiser state.
        micro: clips per forward pass of a rank; `accumulate` such passes make its share of the batch.
        memory: bytes per rank by part.
    """

    task: Task
    device: Device
    ranks: int
    nodes: int
    strategy: Strategy
    shards: int
    checkpointing: Checkpointing
    micro: int
    accumulate: int
    memory: dict[str, float] = field(default_factory=dict)
    why: str = ""

    @property
    def needed(self) -> float:
        """Bytes per rank in all."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.needed <= USABLE * self.device.memory

    @property
    def step_flop(self) -> float:
        """Model FLOP of a step on all ranks."""
        return self.task.batch * self.task.clip_flop

    def compute_seconds(self, rate: float) -> float:
        """Seconds of computing per step at `rate` model FLOP per second and rank; a recomputed forward is extra."""
        extra = {"none": 1.0, "selective": 1.02, "full": 4 / 3}[self.checkpointing]
        return self.step_flop * extra / (self.ranks * rate)

    def communication_seconds(self) -> float:
        """Seconds of traffic per step, most of it hidden behind computing.

        Sharded weights are gathered twice per pass in bf16 and their gradients reduced in float32; copies of the model
        all-reduce float32 gradients once per step.
        """
        if self.ranks == 1:
            return 0.0
        n = self.task.lm.num_parameters()
        across = self.device.network if self.nodes > 1 else self.device.link
        seconds = 0.0
        if self.shards > 1:
            rate = across if self.shards > self.ranks // self.nodes else self.device.link
            seconds += self.accumulate * n * (2 * (2 if self.task.bf16 else 4) + 4) / rate
        if self.shards < self.ranks:
            seconds += 2 * 4 * self.task.trained / self.shards / across
        return seconds


def memory_by_part(
    task: Task, *, device: Device, shards: int, ranks: int, micro: int, accumulate: int, checkpointing: Checkpointing
) -> dict[str, float]:
    """Bytes on one rank by part; see `layer_activations` for the activations.

    Gradients live beside all activations only where they outlast a pass (accumulation, buckets of several ranks); on
    one rank alone they grow while the activations shrink, so the larger of the two counts.
    """
    lm, low = task.lm, 2 if task.bf16 else 4
    n, moving = lm.num_parameters(), task.trained
    layers = n - 2 * lm.num_codebooks * lm.codebook_size * lm.dim
    block, s = layers / lm.num_layers, positions(lm, task.frames)
    layer = layer_activations(lm, task.frames, bf16=task.bf16, cpu=device.is_cpu, checkpointing="none")
    kept = layer_activations(lm, task.frames, bf16=task.bf16, cpu=device.is_cpu, checkpointing=checkpointing)
    activations = micro * (lm.num_layers * kept + (layer if checkpointing != "none" else 0.0))
    gradients = 4.0 * moving / shards
    if ranks == 1 and accumulate == 1:
        gradients = max(gradients - activations, 0.0)
    if shards > 1:  # the block at work and the next one gathered, the gradient of one on its way; the root stays whole
        copies = 2 * low * block + 2 * 4 * block + 2 * 4.0 * (n - layers)
    else:
        copies = low * layers if task.bf16 else 0.0
    heads = lm.num_codebooks * (micro * s * lm.dim * (low + 4) + 4.0 * lm.codebook_size * lm.dim)
    return {
        "weights": 4.0 * (n + task.adapter) / shards,
        "copies at work": copies,
        "gradients": gradients,
        "optimiser": 4.0 * task.moments * moving / shards,
        "EMA": 4.0 * moving / shards,
        "activations": activations,
        "logits and loss": heads,
        "text encoder": 4.0 * ENCODERS.get(lm.condition.text_encoder, 0.0),
    }


def choose(
    task: Task,
    device: Device,
    ranks: int,
    *,
    nodes: int = 1,
    strategy: Strategy | Literal["auto"] = "auto",
    checkpointing: Checkpointing | Literal["auto"] = "auto",
    accumulate: int = 0,
    shard_group: int = 0,
    mfu: float = 0.4,
) -> Plan:
    """The best layout of a task: the first that fits in the order of what costs least, else the smallest there is.

    One copy per rank (DDP) while it fits, because it talks least; then sharding (FSDP2) over
    all ranks, or inside each node (hybrid) from where the weights' traffic between nodes would show. Within
    that: no recomputing before selective before full, and the largest micro-batch.

    Args:
        ranks: processes in all, one per GPU.
        nodes: machines they are on.
        strategy, checkpointing: `auto`, or what is wanted.
        accumulate: parts of a rank's share of the batch; 0 takes as few as fit.
        shard_group: ranks per copy under hybrid sharding; 0 takes a node's.
        mfu: share of the peak at which computing is weighed against traffic.

    Raises:
        UserError: a batch that the ranks or the accumulation do not divide.
    """
    if ranks < 1 or nodes < 1 or ranks % nodes:
        raise UserError(f"{ranks} GPUs on {nodes} nodes: give at least 1 GPU, and a multiple of the nodes")
    parts = ranks * max(accumulate, 1)
    if task.batch % parts:
        near = sorted({max(task.batch // parts, 1) * parts, (task.batch // parts + 1) * parts})
        raise UserError(
            f"batch.size {task.batch} must be a multiple of {ranks} processes"
            + (f" x batch.accumulate {accumulate}" if accumulate else "")
            + f"; for instance {' or '.join(map(str, near))}"
        )
    share = task.batch // ranks
    micros = [share // accumulate] if accumulate else [d for d in range(share, 0, -1) if share % d == 0]
    kinds: Sequence[Checkpointing] = ("none", "selective", "full") if checkpointing == "auto" else (checkpointing,)
    layouts = _layouts(task, device, ranks, nodes, strategy, shard_group)
    smallest: Plan | None = None
    for kind in kinds:
        fitting = []
        for name, shards, why in layouts:
            for micro in micros:
                parts = share // micro
                sizes = {"shards": shards, "ranks": ranks, "micro": micro, "accumulate": parts}
                memory = memory_by_part(task, device=device, checkpointing=kind, **sizes)
                plan = Plan(task, device, ranks, nodes, name, shards, kind, micro, parts, memory, why)
                if smallest is None or plan.needed < smallest.needed:
                    smallest = plan
                if plan.fits:
                    fitting.append(plan)
                    break
        if fitting:
            chosen = fitting[0]
            if chosen.strategy == "fsdp" and len(fitting) > 1:
                compute = chosen.compute_seconds(mfu * (device.peak or 100e12))
                if chosen.communication_seconds() > TRAFFIC_SHOWS * compute:
                    return fitting[1]
            return chosen
    assert smallest is not None
    return smallest


def _layouts(
    task: Task, device: Device, ranks: int, nodes: int, strategy: str, shard_group: int
) -> list[tuple[Strategy, int, str]]:
    """Strategies worth trying, in order, each with the ranks per copy and the reason."""
    if ranks == 1:
        return [("single", 1, "one process")]
    if task.adapter:
        if strategy not in ("auto", "ddp"):
            raise UserError(
                f"hardware.strategy {strategy} with LORA: an adapter is trained on copies of the model alone, whose "
                "frozen weights have no gradients, moments or average to shard; set ddp or auto"
            )
        return [("ddp", 1, "an adapter's gradients are small, so copies of the frozen model talk least")]
    group = shard_group or max(ranks // nodes, 1)
    if strategy == "hybrid" and (ranks % group or not 1 < group < ranks):
        allowed = [g for g in range(2, ranks) if ranks % g == 0]
        raise UserError(
            f"hardware.strategy hybrid with groups of {group} on {ranks} ranks: hardware.shard_group must divide the "
            f"ranks and be smaller; allowed: {', '.join(map(str, allowed)) or 'none, use fsdp or ddp'}"
        )
    whole = 4 * (3 + task.moments) * task.lm.num_parameters() / GIB
    asked = "asked for by hardware.strategy"
    all_of: dict[str, tuple[Strategy, int, str]] = {
        "ddp": ("ddp", 1, "the whole model fits each GPU, and copies talk least"),
        "fsdp": ("fsdp", ranks, f"a whole copy ({whole:.0f} GiB of state) and its activations do not fit one GPU"),
        "hybrid": (
            "hybrid",
            group,
            f"no GPU holds a whole copy; sharding in groups of {group} keeps the weights' traffic off the network",
        ),
    }
    if strategy == "single":
        raise UserError(f"hardware.strategy single is for one process; there are {ranks}. Give ddp, fsdp or hybrid")
    if strategy != "auto":
        name, shards, _ = all_of[strategy]
        return [(name, shards, asked)]
    if nodes > 1 and 1 < group < ranks and ranks % group == 0:
        return [all_of["ddp"], all_of["fsdp"], all_of["hybrid"]]
    return [all_of["ddp"], all_of["fsdp"]]


def what_fits(plan: Plan) -> str:
    """What to change where a plan does not fit: more GPUs of the kind, other GPUs, smaller sizes."""
    task, device = plan.task, plan.device
    hints: list[str] = []
    if not device.is_cpu:
        for ranks in (2, 4, 8, 16, 32, 64, 96, 128, 192):
            nodes = -(-ranks // device.per_node)
            possible = ranks > plan.ranks and task.batch % ranks == 0 and ranks % nodes == 0
            if possible and choose(task, device, ranks, nodes=nodes).fits:
                hints.append(f"{ranks} GPUs of this kind")
                break
        others = [
            d.name
            for d in DEVICES.values()
            if d.memory > device.memory and choose(task, d, plan.ranks, nodes=plan.nodes).fits
        ]
        hints += [f"GPU={others[-1]}"] if others else []
    smaller = [
        name
        for name, shape in SIZES.items()
        if shape.num_parameters() < task.lm.num_parameters()
        and choose(replace(task, lm=shape), device, plan.ranks, nodes=plan.nodes).fits
    ]
    hints += [f"SIZE={smaller[-1]}"] if smaller else []
    if task.frames > 150 and choose(replace(task, frames=task.frames // 4), device, plan.ranks, nodes=plan.nodes).fits:
        hints.append("shorter crops (--batch.crop_seconds)")
    return "; ".join(hints) if hints else "nothing of the above: use GPUs with more memory"


def _size(number: float) -> str:
    return f"{number / GIB:.2f}" if number < 10 * GIB else f"{number / GIB:.1f}"


def lines(plan: Plan, *, name: str, rate: float | None, rate_said: str) -> list[str]:
    """The plan as text.

    Args:
        name: the size's name.
        rate: model FLOP per second and rank that the time is reckoned with; None leaves the time out.
        rate_said: where that rate comes from.
    """
    task, lm, device = plan.task, plan.task.lm, plan.device
    unit = "process" if device.is_cpu else "GPU"
    where = f"{plan.ranks} x {device.name}" + (f" on {plan.nodes} nodes" if plan.nodes > 1 else "")
    per_clip, common = task.clip_flop, common_flop(lm, task.frames)
    out = [
        f"model     {name}: {lm.num_parameters():,} parameters ({lm.num_layers} layers, width {lm.dim}, "
        f"{lm.num_heads} heads), text encoder {lm.condition.text_encoder}",
        *(
            [
                f"adapter   {task.adapter:,} parameters are trained ({task.adapter / lm.num_parameters():.2%}); no "
                "gradients of the others: 2/3 of the FLOP"
            ]
            if task.adapter
            else []
        ),
        f"step      {task.batch} x {task.crop_seconds:g} s = {task.batch * task.crop_seconds:,.0f} s of audio, "
        f"{plan.step_flop:.3g} FLOP ({FLOP_RULE}; by (6N + 12LdT) T {common / per_clip:.2f} times that)",
        f"hardware  {where}, {'bf16 with float32 master weights' if task.bf16 else 'float32'}, "
        f"{device.memory / GIB:.1f} GiB per {unit}",
        f"strategy  {plan.strategy}" + (f" over {plan.shards} ranks" if plan.shards > 1 else "") + f": {plan.why}",
        f"batch     {plan.micro} clips per pass x {plan.accumulate} passes x {plan.ranks} ranks, "
        f"activation checkpointing {plan.checkpointing}",
        f"memory    {_size(plan.needed)} GiB per {unit} of {device.memory / GIB:.1f} (up to {USABLE:.0%} is used): "
        + ", ".join(f"{part} {_size(value)}" for part, value in plan.memory.items() if value >= 0.005 * GIB),
    ]
    if lm.condition.text_encoder not in ENCODERS:
        out.append(f"          without the text encoder {lm.condition.text_encoder!r}, whose size is not known")
    if rate:
        compute, talk = plan.compute_seconds(rate), plan.communication_seconds()
        # Traffic is hidden behind computing as long as there is enough of it.
        step = max(compute, talk)
        days = task.steps * step / 86400
        out.append(
            f"time      {step:.3g} s per step at {rate_said} (computing {compute:.3g} s"
            + (f", traffic {talk:.3g} s, hidden behind it" if 0 < talk <= compute else "")
            + (f", traffic {talk:.3g} s, which is the longer" if talk > compute else "")
            + f"); {task.steps:,} steps take "
            + (
                f"{days:,.1f} days, {days * plan.ranks:,.0f} {unit}-days"
                if days > 2
                else f"{24 * 60 * days:,.1f} minutes"
            )
        )
    if not plan.fits:
        out.append(
            f"no room   the smallest layout needs {_size(plan.needed)} GiB per {unit}, "
            f"{_size(USABLE * device.memory)} can be used. What fits: {what_fits(plan)}"
        )
    return out


@dataclass(frozen=True)
class PlanConfig:
    """Print the plan of a training run on hardware that need not be here.

    Args:
        gpus: GPUs in all.
        gpu: kind of GPU, see `DEVICES`.
        per_node: GPUs per machine; 0 takes what is usual for the kind.
        mfu: share of the peak that the time is reckoned with.
    """

    gpus: int = 1
    gpu: str = "h100-80"
    per_node: int = 0
    mfu: float = 0.4


def main(argv: Sequence[str]) -> int:
    """Print a plan: `PlanConfig`, and all settings of training. Ends with exit code 2 where it cannot fit."""
    from musicgen import settings
    from training import train

    own: list[str] = []
    rest: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token.removeprefix("--").split("=", 1)[0] in ("gpus", "gpu", "per_node", "mfu"):
            own += [token] if "=" in token else [token, *tokens[:1]]
            tokens = tokens if "=" in token else tokens[1:]
        else:
            rest.append(token)
    wanted = settings.parse(PlanConfig, own, prog="python -m training.budget")
    if wanted.gpus < 1 or wanted.per_node < 0 or not 0 < wanted.mfu <= 1:
        raise UserError(
            f"GPUS={wanted.gpus}, per_node {wanted.per_node}, mfu {wanted.mfu}: "
            "GPUS must be at least 1, per_node at least 0, mfu above 0 and at most 1"
        )
    device = device_named(wanted.gpu)
    config = train.read_config(rest, folders=False)
    per_node = min(wanted.per_node or device.per_node, wanted.gpus)
    if wanted.gpus % per_node:
        raise UserError(f"GPUS={wanted.gpus} is not a multiple of the {per_node} of a node; give --per_node")
    plan = choose(
        replace(train.task_of(config), bf16=config.hardware.precision != "float32"),  # for GPUs, wherever it is printed
        device,
        wanted.gpus,
        nodes=wanted.gpus // per_node,
        **train.layout_settings(config),
        mfu=wanted.mfu,
    )
    rate, said = rate_of(device, bf16=True, mfu=wanted.mfu)
    print("\n".join(lines(plan, name=config.size, rate=rate, rate_said=said)))
    if not plan.fits:
        raise UserError(f"SIZE={config.size} does not fit {wanted.gpus} x {device.name}; see the plan above")
    return 0


if __name__ == "__main__":
    from musicgen import settings as _settings

    _settings.run(main)
