"""The plan of a run before it starts: FLOP, memory by part, strategy and micro-batch.

Closed formulas over the model's shape; nothing is built and nothing is downloaded. A training run takes strategy,
checkpointing and micro-batch from them where the settings say `auto`; `training.forecast` puts them into words, and
`training.rehearsal` counts the bytes of a step that is really made.

Model FLOP are counted by one rule, `FLOP_RULE`, printed beside every share of the peak (MFU): the widespread
6N + 12LdT charges full instead of causal attention and comes out about a fifth higher for the same work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from musicgen import patterns
from musicgen.adapters import AdapterConfig, num_parameters
from musicgen.config import LMConfig
from musicgen.errors import UserError
from training import loss
from training.devices import GIB, Device, expected_mfu

WHOLE = AdapterConfig()  # no adapter: the whole model is trained
FLOP_RULE = "3 x forward; matrix products of layers and heads, causal half of attention, no recompute, no text encoder"
TEXT_TOKENS = 32  # of a caption, where none is at hand to count
TRAFFIC_SHOWS = 1 / 3  # of computing: from here on that layout is preferred which talks least
# Seconds for which one rank of a ring waits for the one before it, inside a node and between two: NCCL's own reckoning
# (hwLatencies of its LL128 rings, src/graph/tuning.cc).
HOP, FAR_HOP = 1.9e-6, 4.0e-6
NEAR = 1.03  # times the least time of a step: as good, so that the simpler layout is taken
# Forward passes that are made again. `selective` repeats no matrix product; its norms and activations are set at a
# twentieth of a step's time, assumed and not measured.
RECOMPUTED = {"none": 0.0, "selective": 0.15, "full": 1.0}
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


def layer_activations(
    lm: LMConfig,
    frames: int,
    *,
    bf16: bool,
    cpu: bool,
    checkpointing: Checkpointing,
    lora: AdapterConfig = WHOLE,
) -> float:
    """Bytes that one layer keeps of one clip for the backward pass.

    The residual stream and what the norms keep of it are float32; inputs of matrix products are bf16 under autocast.
    Per position and unit of width: norms 4 + 4 + 4 (their inputs); self-attention 1 in, 3 q/k/v, 1 out; cross-attention
    1 in, 1 query, 1 out; feed-forward 1 in, 4 + 4 around the activation. `selective` keeps what matrix products and
    attention put out, `full` the layer's input alone. An adapter (`lora`) adds what `_adapter_keeps` says, and the
    masks of its dropout.
    """
    s, d, low = positions(lm, frames) + prefix(lm), lm.dim, 2 if bf16 else 4
    cross = 1 if lm.cross_attention else 0
    f = lm.ffn_mult
    if checkpointing == "full":
        return 4.0 * s * d
    if checkpointing == "selective":
        return s * d * (4.0 + low * (3 + 1 + 1 + cross * 3 + f + 1)) + s * _adapter_keeps(lm, low, lora, outputs=True)
    kept = s * d * (4.0 * (2 + cross) + low * (1 + 3 + 1 + cross * 3 + 1 + 2 * f))
    if cpu and bf16:  # attention is written out there (musicgen.transformer.attend): its weights are kept
        kept += 2.0 * lm.num_heads * s * (s + cross * TEXT_TOKENS)
    kept += s * _adapter_keeps(lm, low, lora)
    if lora.rank and lora.dropout:  # a mask of what each layer's adapter hears; a GPU's is of bytes
        kept += s * d * (4.0 if cpu else 1.0) * (5 + cross * 2 + f)
    return kept


def _adapter_keeps(lm: LMConfig, low: int, lora: AdapterConfig, *, outputs: bool = False) -> float:
    """Bytes per position that an adapter adds to a layer: what lies between its factors, and its inputs, of which
    queries, keys and values each take one and both attentions' projections one more, where casts or dropout part them
    from the layer's; with `outputs` those of its second factors in their place."""
    if not lora.rank:
        return 0.0
    cross, d = 1 if lm.cross_attention else 0, lm.dim
    between = (6 + cross * 2) * lora.rank
    if outputs:
        return float(low * (between + d * (5 + cross * 2 + lm.ffn_mult)))
    return float(low * (between + d * (3 + cross) * (low == 2 or lora.dropout > 0)))


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
        lora: of an adapter, which alone is trained.
    """

    lm: LMConfig
    batch: int
    frames: int
    steps: int
    bf16: bool = True
    moments: int = 2
    crop_seconds: float = 30.0
    lora: AdapterConfig = WHOLE

    @property
    def adapter(self) -> int:
        """Parameters of the adapter; 0 where the model is trained."""
        return num_parameters(self.lm, self.lora.rank)

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
        why: of the strategy.
        why_recomputed: of the checkpointing, empty where nothing is recomputed.
        asked: settings that narrowed the choice, as `choose` takes them.
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
    why_recomputed: str = ""
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def needed(self) -> float:
        """Bytes per rank in all."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.needed <= USABLE * self.device.memory

    @property
    def shares_casts(self) -> bool:
        """Whether the parts of a step share bf16 copies of the weights (`training.copies`); shards are sent in bf16."""
        return self.task.bf16 and self.shards == 1 and self.accumulate > 1

    @property
    def step_flop(self) -> float:
        """Model FLOP of a step on all ranks."""
        return self.task.batch * self.task.clip_flop

    @property
    def recompute_share(self) -> float:
        """Time of recomputing, beside that of the model FLOP: three forward passes, two under an adapter."""
        return RECOMPUTED[self.checkpointing] / (2 if self.task.adapter else 3)

    def compute_seconds(self, rate: float) -> float:
        """Seconds of computing per step at `rate` model FLOP per second and rank, recomputing included."""
        return self.step_flop * (1 + self.recompute_share) / (self.ranks * rate)

    def step_seconds(self, rate: float) -> float:
        """Seconds per step: traffic is hidden behind computing as long as there is enough of it."""
        return max(self.compute_seconds(rate), self.communication_seconds())

    def communication_seconds(self) -> float:
        """Seconds of traffic per step on the busier of the two ways, most of it hidden behind computing."""
        return max(self.traffic_seconds())

    def traffic_seconds(self) -> tuple[float, float]:
        """Seconds of traffic per step inside the nodes and between them.

        Sharded weights are gathered twice per pass, in bf16 where the run computes so, and their gradients reduced in
        float32: each in a ring over the ranks that share a copy, at the pace of its slowest link, with a hop per rank
        and block. Copies all-reduce float32 gradients once per step, mirrored shards too (`strategy.sum_mirrors`), in
        trees whose few hops are left out. Where groups stay inside a node, the network carries gradients while the
        links inside carry weights: FSDP2 gives the two queues of their own.
        """
        if self.ranks == 1:
            return 0.0, 0.0
        device, per_node = self.device, self.ranks // self.nodes
        inside = between = 0.0
        if self.shards > 1:
            low, n = 2 if self.task.bf16 else 4, self.task.lm.num_parameters()
            share = self.accumulate * n * (2 * low + 4) * (1 - 1 / self.shards)
            if per_node % self.shards:
                between += share / min(device.link, device.network) + self.hop_seconds()
            else:
                inside += share / device.link + self.hop_seconds()
        if self.shards < self.ranks:
            sent = 2 * 4 * self.task.trained / self.shards
            # Mirrors that share a node add up first, then nodes; parts go out side by side over what a node's cards
            # reach together.
            here = max(per_node // self.shards, 1)
            nodes = self.ranks // self.shards // here
            inside += sent * (1 - 1 / here) / device.link
            between += sent * min(self.shards, per_node) * (1 - 1 / nodes) / device.network
        return inside, between

    def links_needed(self, rate: float) -> float | None:
        """How many times as fast links would have to be for traffic to hide behind computing at `rate`; None where hops
        alone take longer."""
        hops, compute = self.hop_seconds(), self.compute_seconds(rate)
        return (self.communication_seconds() - hops) / (compute - hops) if compute > hops else None

    def hop_seconds(self) -> float:
        """Seconds per step for which rings of sharded weights wait for their ranks, however fast the links are."""
        per_node = self.ranks // self.nodes
        nodes = -(-self.shards // per_node)
        hops = (self.shards - nodes) * HOP + (nodes - 1) * FAR_HOP
        return self.accumulate * 3 * self.task.lm.num_layers * hops


def memory_by_part(
    task: Task, *, device: Device, shards: int, ranks: int, micro: int, accumulate: int, checkpointing: Checkpointing
) -> dict[str, float]:
    """Bytes on one rank by part; see `layer_activations` for the activations.

    Gradients live beside all activations only where they outlast a pass (accumulation, the buckets of DDP); elsewhere
    they grow while activations and autocast's copies go, so the larger of the two counts. `training.rehearsal` counts a
    step that is really made.
    """
    lm, low = task.lm, 2 if task.bf16 else 4
    n, moving = lm.num_parameters(), task.trained
    layers = n - 2 * lm.num_codebooks * lm.codebook_size * lm.dim
    block, s = layers / lm.num_layers, positions(lm, task.frames)
    of_layer = functools.partial(layer_activations, lm, task.frames, bf16=task.bf16, cpu=device.is_cpu, lora=task.lora)
    layer = micro * of_layer(checkpointing="none")
    kept = micro * lm.num_layers * of_layer(checkpointing=checkpointing)
    if not lm.cross_attention:  # the text in the prefix asks for a mask, one for all layers
        kept += micro * low * (s + prefix(lm)) ** 2
    heads = lm.num_codebooks * (micro * s * lm.dim * (low + 4) + 4.0 * lm.codebook_size * lm.dim)
    rows = loss.chunk_rows("cpu" if device.is_cpu else "cuda", lm.codebook_size)
    heads += (low + 2 * 4.0) * min(rows, micro * s) * lm.codebook_size  # logits, the same and their softmax in float32
    # The loss is there before the first layer is made again.
    activations = kept + (max(layer - heads, 0.0) if checkpointing != "none" else 0.0)
    if shards > 1:  # two blocks gathered and one arriving, the gradient of one on its way; the root stays whole
        copies = 3 * low * block + 4 * block + 4.0 * (n - layers)
    else:
        copies = low * layers if task.bf16 else 0.0
    gradients = 4.0 * moving / shards
    if (ranks == 1 or shards > 1) and accumulate == 1:
        released = activations + heads - layer + (copies if shards == 1 else 0.0)
        gradients = max(gradients - released, 0.0)
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
    mfu: float = 0.0,
) -> Plan:
    """The layout of a task that should take the least time per step, else the smallest there is.

    All strategies and kinds of recomputing are weighed, each with the largest micro-batch that fits. Of those within
    `NEAR` of the least time the first is taken: no recomputing before selective before full; within that one copy per
    rank (DDP), then sharding (FSDP2) over all ranks, or, from where that traffic would show (`TRAFFIC_SHOWS`), what
    talks less of it and of sharding inside each node (hybrid), whose weights do not travel between nodes.

    Args:
        ranks: processes in all, one per GPU.
        nodes: machines they are on.
        strategy, checkpointing: `auto`, or what is wanted.
        accumulate: parts of a rank's share of the batch; 0 takes as few as fit.
        shard_group: ranks per copy under hybrid sharding; 0 takes a node's.
        mfu: share of the peak at which computing is weighed against traffic; 0 takes `expected_mfu`.

    Raises:
        UserError: a batch that the ranks or the accumulation do not divide, or a strategy that cannot be.
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
    layouts = _layouts(task, ranks, nodes, strategy, shard_group)
    wanted = {
        "strategy": strategy,
        "checkpointing": checkpointing,
        "accumulate": accumulate,
        "shard_group": shard_group,
    }
    asked = {name: value for name, value in wanted.items() if value not in ("auto", 0)}
    # No rate is measured here: every rank must come to the same choice.
    peak = device.peak_in(bf16=task.bf16) or (1e12 if device.is_cpu else 100e12)
    rate = (mfu or expected_mfu(task.lm.dim)) * peak
    fitting: list[Plan] = []
    smallest: dict[str, Plan] = {}  # of each kind
    for kind in kinds:
        of_kind: list[Plan] = []
        for name, shards, why in layouts:
            for micro in micros:
                parts = share // micro
                sizes = {"shards": shards, "ranks": ranks, "micro": micro, "accumulate": parts}
                memory = memory_by_part(task, device=device, checkpointing=kind, **sizes)
                plan = Plan(task, device, ranks, nodes, name, shards, kind, micro, parts, memory, why=why, asked=asked)
                if kind not in smallest or plan.needed < smallest[kind].needed:
                    smallest[kind] = plan
                if plan.fits:
                    of_kind.append(plan)
                    break
        sharded = next((plan for plan in of_kind if plan.strategy == "fsdp"), None)
        if sharded and sharded.communication_seconds() > TRAFFIC_SHOWS * sharded.compute_seconds(rate):
            of_kind.sort(key=lambda plan: (plan.strategy != "ddp", plan.communication_seconds()))
        fitting += of_kind
    if fitting:
        least = min(plan.step_seconds(rate) for plan in fitting)
        chosen = next(plan for plan in fitting if plan.step_seconds(rate) <= NEAR * least)
    else:
        chosen = min(smallest.values(), key=lambda plan: plan.needed)
    return replace(chosen, why=_why(chosen, fitting, rate), why_recomputed=_why_recomputed(chosen, fitting, smallest))


def _why(chosen: Plan, fitting: Sequence[Plan], rate: float) -> str:
    """Why a strategy was taken, in words: with the figures where another one would do as well."""
    if "strategy" in chosen.asked:
        return chosen.why
    same = {plan.strategy: plan for plan in fitting if plan.checkpointing == chosen.checkpointing}
    if chosen.strategy == "hybrid" and "fsdp" in same:
        own, other = chosen.communication_seconds(), same["fsdp"].communication_seconds()
        return f"{chosen.why} ({own:.3g} s of traffic; over all ranks {other:.3g} s)"
    copies = [plan for plan in fitting if plan.strategy == "ddp"]
    if chosen.strategy == "fsdp" and copies:
        least = min(copies, key=lambda plan: plan.step_seconds(rate))
        how = "" if least.checkpointing == "none" else f" only with {least.checkpointing} recomputing"
        seconds = f"{least.step_seconds(rate):.3g} s per step instead of {chosen.step_seconds(rate):.3g} s"
        return f"a whole copy fits one GPU{how}, which makes it {seconds}"
    return chosen.why


def _why_recomputed(chosen: Plan, fitting: Sequence[Plan], smallest: dict[str, Plan]) -> str:
    """Why a plan recomputes as much as it does, in words."""
    kind = chosen.checkpointing
    if kind == "none":
        return ""
    if "checkpointing" in chosen.asked:
        return "asked for by hardware.checkpointing"
    if not chosen.fits:
        return "it takes the least memory"
    less = [plan for plan in fitting if RECOMPUTED[plan.checkpointing] < RECOMPUTED[kind]]
    if not less:
        least = min(plan.needed for other, plan in smallest.items() if RECOMPUTED[other] < RECOMPUTED[kind])
        return f"{'without it' if kind == 'selective' else 'with less of it'} {least / GIB:.1f} GiB would be needed"
    if any(plan.strategy == chosen.strategy for plan in less):
        return "because fewer passes cost less traffic"
    return f"because {chosen.strategy} then fits, which costs less traffic"


def _layouts(task: Task, ranks: int, nodes: int, strategy: str, shard_group: int) -> list[tuple[Strategy, int, str]]:
    """Strategies worth trying, in order, each with the ranks per copy and the reason."""
    if ranks == 1:
        moot = f"; hardware.strategy {strategy} takes several" if strategy not in ("auto", "single") else ""
        return [("single", 1, f"one process{moot}")]
    if task.adapter:
        if strategy not in ("auto", "ddp"):
            raise UserError(
                f"hardware.strategy {strategy} with LORA: an adapter is trained on copies of the model alone, whose "
                "frozen weights have no gradients, moments or average to shard; set ddp or auto"
            )
        return [("ddp", 1, "an adapter's gradients are small, so copies of the frozen model talk least")]
    whole_only = task.moments > 2  # their step flattens each parameter, which FSDP2 shards unevenly
    if whole_only and strategy in ("fsdp", "hybrid"):
        raise UserError(
            f"hardware.strategy {strategy} with dadapt or prodigy: the adaptive optimisers keep whole tensors; use ddp "
            "or --optim.name adamw"
        )
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
        "ddp": ("ddp", 1, "the whole model fits each process, and copies talk least"),
        "fsdp": ("fsdp", ranks, f"a whole copy ({whole:.0f} GiB of state) and its activations do not fit one GPU"),
        "hybrid": (
            "hybrid",
            group,
            f"weights travel inside groups of {group}, between them only gradients",
        ),
    }
    if strategy == "single":
        raise UserError(f"hardware.strategy single is for one process; there are {ranks}. Give ddp, fsdp or hybrid")
    if strategy != "auto":
        name, shards, _ = all_of[strategy]
        return [(name, shards, asked)]
    if whole_only:
        return [("ddp", 1, "the adaptive optimisers keep whole tensors, which are not sharded")]
    if nodes > 1 and 1 < group < ranks and ranks % group == 0:
        return [all_of["ddp"], all_of["fsdp"], all_of["hybrid"]]
    return [all_of["ddp"], all_of["fsdp"]]
