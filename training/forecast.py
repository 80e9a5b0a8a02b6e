"""The plan of a run in words: `make plan`, and the first lines of every training.

    make plan SIZE=3.3b GPUS=64 GPU=h100-80        (python -m training.forecast --size 3.3b --gpus 64 --gpu h100-80)

`--rehearse true` also makes a step on tensors without storage and sets torch's own count of its memory beside the
plan's (`training.rehearsal`); that takes seconds to a minute, and no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from musicgen.adapters import AdapterConfig
from musicgen.config import SIZES
from musicgen.errors import UserError
from training import budget
from training.budget import Plan, Task
from training.config import layout_settings, read_config, task_of
from training.devices import DEVICES, GIB, Device, device_named, expected_mfu, rate_of
from training.strategy import HardwareConfig

ADAPTER = 16  # rank of the adapter that is named where a whole model does not fit
FLAGS = {
    "strategy": "--hardware.strategy",
    "checkpointing": "--hardware.checkpointing",
    "accumulate": "--batch.accumulate",
    "shard_group": "--hardware.shard_group",
}


def _tried(task: Task, device: Device, ranks: int, nodes: int, asked: dict[str, Any]) -> Plan | None:
    """The plan of these settings where it fits."""
    try:
        plan = budget.choose(task, device, ranks, nodes=nodes, **asked)
    except UserError:
        return None
    return plan if plan.fits else None


def what_fits(plan: Plan) -> str:
    """What to change where a plan does not fit: own settings first, then more or other GPUs, smaller sizes, LORA."""
    task, asked = plan.task, plan.asked
    freed = ""
    for dropped in [[name] for name in asked] + ([list(asked)] if len(asked) > 1 else []):
        kept = {name: value for name, value in asked.items() if name not in dropped}
        if found := _tried(task, plan.device, plan.ranks, plan.nodes, kept):
            freed = (
                f"{FLAGS['accumulate']} {found.accumulate}"
                if dropped == ["accumulate"]
                else f"without {' '.join(f'{FLAGS[name]} {asked[name]}' for name in dropped)} it fits"
            )
            break
    hints = ([freed] if freed else []) + _elsewhere(plan, asked)
    if not hints and asked and (hints := _elsewhere(plan, {})):
        hints[0] = f"without {' '.join(f'{FLAGS[name]} {value}' for name, value in asked.items())}: {hints[0]}"
    return "; ".join(hints) if hints else "nothing of the above: use GPUs with more memory"


def _elsewhere(plan: Plan, asked: dict[str, Any]) -> list[str]:
    """Other hardware or tasks that fit with these settings."""
    task, device, ranks, nodes = plan.task, plan.device, plan.ranks, plan.nodes
    hints: list[str] = []
    if not device.is_cpu:
        machine = device.per_node
        numbers = {2, 4, 8, 16, 32, 64, 96, 128, 192, *(machine * times for times in (1, 2, 3, 4, 8, 12, 16, 24))}
        for more in sorted(n for n in numbers if n > ranks and task.batch % n == 0):
            parts_well = more <= machine or more % machine == 0
            if parts_well and _tried(task, device, more, max(1, more // machine), asked):
                hints.append(f"{more} GPUs of this kind")
                break
        others = [d.name for d in DEVICES.values() if d.memory > device.memory and _tried(task, d, ranks, nodes, asked)]
        hints += [f"GPU={others[-1]}"] if others else []
    smaller = [
        name
        for name, shape in SIZES.items()
        if shape.num_parameters() < task.lm.num_parameters()
        and _tried(replace(task, lm=shape), device, ranks, nodes, asked)
    ]
    hints += [f"SIZE={smaller[-1]}"] if smaller else []
    if task.frames > 150 and _tried(replace(task, frames=task.frames // 4), device, ranks, nodes, asked):
        hints.append("shorter crops (--batch.crop_seconds)")
    if task.moments > 2 and _tried(replace(task, moments=2), device, ranks, nodes, asked):
        hints.append("--optim.name adamw")
    adapter = replace(task, lora=AdapterConfig(rank=ADAPTER))
    if not task.adapter and _tried(adapter, device, ranks, nodes, asked):
        hints.append(f"an adapter (LORA={ADAPTER} with INIT=)")
    return hints


def what_cuts_traffic(plan: Plan, rate: float) -> str:
    """What would shorten the steps of a plan whose traffic is longer than its computing.

    Args:
        rate: model FLOP per second and rank.
    """
    task, faster = plan.task, plan.links_needed(rate)
    hints = [f"links {faster:.1f} times as fast"] if faster else []

    def better(changed: Task, asked: dict[str, Any]) -> Plan | None:
        found = _tried(changed, plan.device, plan.ranks, plan.nodes, asked)
        before = plan.step_seconds(rate) * changed.batch / task.batch
        return found if found and found.step_seconds(rate) < 0.9 * before else None

    for name in plan.asked:
        kept = {other: value for other, value in plan.asked.items() if other != name}
        if found := better(task, kept):
            hints.append(f"{found.step_seconds(rate):.3g} s without {FLAGS[name]} {plan.asked[name]}")
    if "strategy" not in plan.asked and "shard_group" not in plan.asked:
        groups = [group for group in range(2, plan.shards) if plan.ranks % group == 0]
        tried = [better(task, plan.asked | {"strategy": "hybrid", "shard_group": group}) for group in groups]
        if found := min((p for p in tried if p), key=lambda p: p.step_seconds(rate), default=None):
            flags = f"--hardware.strategy hybrid --hardware.shard_group {found.shards}"
            hints.append(f"{found.step_seconds(rate):.3g} s with {flags}")
    for times in (2, 4, 8):
        if found := better(replace(task, batch=times * task.batch), plan.asked):
            hints.append(
                f"{found.step_seconds(rate) / times:.3g} s per {task.batch} clips with --batch.size {found.task.batch}"
            )
            break
    return "; ".join(hints) or "fewer GPUs, or a larger --batch.size"


def _size(number: float) -> str:
    return f"{number / GIB:.2f}" if number < 10 * GIB else f"{number / GIB:.1f}"


def _unused_group(plan: Plan) -> list[str]:
    """A line where groups of ranks were asked for and the plan has none."""
    group = plan.asked.get("shard_group")
    if not group or plan.strategy == "hybrid":
        return []
    whole_only = plan.ranks == 1 or plan.task.adapter or plan.task.moments > 2
    how = "" if whole_only else "; --hardware.strategy hybrid takes them"
    return [f"          hardware.shard_group {group} is not used: only hybrid has groups, this is {plan.strategy}{how}"]


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
    per_clip, common = task.clip_flop, budget.common_flop(lm, task.frames)
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
        f"{plan.step_flop:.3g} FLOP ({budget.FLOP_RULE}; by (6N + 12LdT) T {common / per_clip:.2f} times that)",
        f"hardware  {where}, {'bf16 with float32 master weights' if task.bf16 else 'float32'}, "
        f"{device.memory / GIB:.1f} GiB per {unit}",
        f"strategy  {plan.strategy}" + (f" over {plan.shards} ranks" if plan.shards > 1 else "") + f": {plan.why}",
        *_unused_group(plan),
        f"batch     {plan.micro} clips per pass x {plan.accumulate} passes x {plan.ranks} ranks, "
        f"activation checkpointing {plan.checkpointing}" + (f": {plan.why_recomputed}" if plan.why_recomputed else ""),
        f"memory    {_size(plan.needed)} GiB per {unit} of {device.memory / GIB:.1f} "
        f"(up to {budget.USABLE:.0%} is used): "
        + ", ".join(f"{part} {_size(value)}" for part, value in plan.memory.items() if value >= 0.005 * GIB),
    ]
    if lm.condition.text_encoder not in budget.ENCODERS:
        out.append(f"          without the text encoder {lm.condition.text_encoder!r}, whose size is not known")
    if rate:
        compute, talk = plan.compute_seconds(rate), plan.communication_seconds()
        step = plan.step_seconds(rate)
        days = task.steps * step / 86400
        out.append(
            f"time      {step:.3g} s per step at {rate_said} (computing {compute:.3g} s"
            + (", recomputing included" if plan.recompute_share else "")
            + (f", traffic {talk:.3g} s, hidden behind it" if 0 < talk <= compute else "")
            + (f", traffic {talk:.3g} s, which is the longer" if talk > compute else "")
            + f"); {task.steps:,} steps take "
            + (
                f"{days:,.1f} days, {days * plan.ranks:,.0f} {unit}-days"
                if days > 1
                else f"{24 * days:,.1f} hours"
                if days > 1 / 12
                else f"{24 * 60 * days:,.1f} minutes"
            )
        )
        if talk > compute and plan.fits:
            out.append(f"traffic   what would help: {what_cuts_traffic(plan, rate)}")
    else:
        out.append(f"time      not known: no peak of {device.name} in {'bf16' if task.bf16 else 'float32'} is known")
    if not plan.fits:
        out.append(
            f"no room   the smallest layout needs {_size(plan.needed)} GiB per {unit}, "
            f"{_size(budget.USABLE * device.memory)} can be used. What fits: {what_fits(plan)}"
        )
    return out


@dataclass(frozen=True)
class PlanConfig:
    """Print the plan of a training run on hardware that need not be here.

    GPUS and `per_node` say how many processes and machines there are, in place of `hardware.devices` and
    `hardware.nodes`.

    Args:
        gpus: GPUs in all.
        gpu: kind of GPU, see `DEVICES`.
        per_node: GPUs per machine; 0 takes what is usual for the kind.
        mfu: share of the peak that the time is reckoned with; 0 takes what one H200 reached for the model's width.
        rehearse: also make a step on tensors without storage and print torch's own count of its memory; seconds to
            minutes.
    """

    gpus: int = 1
    gpu: str = "h100-80"
    per_node: int = 0
    mfu: float = 0.0
    rehearse: bool = False


def rehearsed(plan: Plan) -> str:
    """The plan's memory beside that of a step that is made, as a line."""
    from training import rehearsal

    planned, counted = plan.needed - plan.memory["text encoder"], rehearsal.peak_bytes(plan)
    return (
        f"rehearsal {_size(counted)} GiB at the peak of a step on tensors without storage, by torch's memory tracker; "
        f"the plan says {_size(planned)} (both without the text encoder), {planned / counted - 1:+.1%}"
    )


def _check_hardware(hardware: HardwareConfig, argv: Sequence[str], **planned: int) -> None:
    """Raises `UserError` where settings of a run name other machines than the plan is for."""
    given = {name.split("=", 1)[0] for name in argv}
    for name, number in planned.items():
        asked = getattr(hardware, name)
        if asked != number and (f"--hardware.{name}" in given or asked != getattr(HardwareConfig(), name)):
            raise UserError(
                f"hardware.{name} is {asked}, and this plan is for {planned['devices']} GPUs on each of its machines, "
                f"of which there are {planned['nodes']}: a plan takes both from GPUS=… and --per_node …; leave "
                "hardware.devices and hardware.nodes out"
            )


def main(argv: Sequence[str]) -> int:
    """Print a plan: `PlanConfig`, and all settings of training. Ends with exit code 2 where it cannot fit."""
    from musicgen import settings

    own, rest = settings.split(PlanConfig, argv)
    wanted = settings.parse(PlanConfig, own, prog="python -m training.forecast")
    if wanted.gpus < 1 or wanted.per_node < 0 or not 0 <= wanted.mfu <= 1:
        raise UserError(
            f"GPUS={wanted.gpus}, per_node {wanted.per_node}, mfu {wanted.mfu}: "
            "GPUS must be at least 1, per_node at least 0, mfu from 0 to 1"
        )
    device = device_named(wanted.gpu)
    config = read_config(rest, folders=False)
    if config.lora.rank and not config.init:
        raise UserError(f"LORA={config.lora.rank} trains an adapter of a model: give it as INIT=")
    mfu = wanted.mfu or expected_mfu(config.lm.dim)
    device = replace(device, per_node=wanted.per_node or device.per_node)  # what fits is looked for on such machines
    per_node = min(device.per_node, wanted.gpus)
    if wanted.gpus % per_node:
        raise UserError(f"GPUS={wanted.gpus} is not a multiple of the {per_node} of a node; give --per_node")
    _check_hardware(config.hardware, rest, nodes=wanted.gpus // per_node, devices=per_node)
    plan = budget.choose(
        replace(task_of(config), bf16=config.hardware.precision != "float32"),  # for GPUs, wherever it is printed
        device,
        wanted.gpus,
        nodes=wanted.gpus // per_node,
        **layout_settings(config),
        mfu=mfu,
    )
    rate, said = rate_of(device, bf16=plan.task.bf16, mfu=mfu, assumed=bool(wanted.mfu))
    print("\n".join(lines(plan, name=config.size, rate=rate, rate_said=said)), flush=True)
    if wanted.rehearse:
        print(rehearsed(plan))
    if not plan.fits:
        raise UserError(f"SIZE={config.size} does not fit {wanted.gpus} x {device.name}; see the plan above")
    return 0


if __name__ == "__main__":
    from musicgen import settings as _settings

    _settings.run(main)
