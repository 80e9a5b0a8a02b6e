"""The plan: counts against the model itself, known figures, choices, and what is refused."""

import dataclasses
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from musicgen import adapters, transformer
from musicgen.adapters import AdapterConfig
from musicgen.config import LMConfig, size
from musicgen.errors import UserError
from musicgen.lm import MusicLM
from training import budget, devices, forecast, start, train
from training.budget import Task, choose
from training.config import read_config, task_of
from training.devices import DEVICES, Device

FRAMES = 1500


def task(name: str = "3.3b", **changes: Any) -> Task:
    return dataclasses.replace(Task(size(name), 192, FRAMES, 1_000_000), **changes)


@pytest.mark.parametrize(("name", "clip", "common"), [("300m", 3.61e12, 4.46e12), ("1.5b", 1.55e13, 1.86e13)])
def test_flop_of_a_clip(name: str, clip: float, common: float) -> None:
    assert budget.train_flop(size(name), FRAMES) == pytest.approx(clip, rel=5e-3)
    assert budget.common_flop(size(name), FRAMES) == pytest.approx(common, rel=5e-3)


def test_flop_are_what_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = LMConfig(dim=64, num_layers=2, num_heads=2, codebook_size=128)
    lm, frames, words = MusicLM(config), 61, 7
    tokens = torch.zeros(1, 4, budget.positions(config, frames), dtype=torch.long)
    text, mask = torch.randn(1, words, 768), torch.ones(1, words, dtype=torch.bool)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        lm(tokens, text, mask)
    parts = budget.forward_flop(config, frames, words)
    projection = 2 * words * 768 * 64
    # torch counts the whole square of self-attention, the rule its causal half
    assert counted.get_total_flops() == sum(parts.values()) + parts["self-attention"] + projection


def kept_bytes(config: LMConfig, frames: int, bf16: bool, lora: AdapterConfig) -> int:
    """Bytes that one block keeps of one clip for the backward pass, by torch's own account."""
    lm = MusicLM(config)
    block = (adapters.attach(lm, lora) if lora.rank else lm).transformer.layers[0]
    s = budget.positions(config, frames)
    x, text = torch.randn(1, s, config.dim), torch.randn(1, budget.TEXT_TOKENS, config.dim)
    mask = torch.ones(1, budget.TEXT_TOKENS, dtype=torch.bool)
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if s in tensor.shape and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x.requires_grad_()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        out = block(x, text, mask)
    return sum(kept.values()) if out is not None else 0


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("lora", [AdapterConfig(), AdapterConfig(16), AdapterConfig(32, dropout=0.1)])
def test_activations_are_what_autograd_keeps(bf16: bool, lora: AdapterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # Torch's fused attention in both types, as on a GPU, whose dropout keeps a smaller mask.
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        transformer, "attend", lambda q, k, v, mask=None: sdpa(q, k, v, attn_mask=mask, is_causal=mask is None)
    )
    config = LMConfig(dim=128, num_layers=1, num_heads=2)
    expected = budget.layer_activations(config, 800, bf16=bf16, cpu=False, checkpointing="none", lora=lora)
    if lora.dropout:
        masks = budget.positions(config, 800) * config.dim * (7 + config.ffn_mult)
        expected += 3 * masks
        on_cpu = budget.layer_activations(config, 800, bf16=False, cpu=True, checkpointing="none", lora=lora)
        assert bf16 or on_cpu == expected
    assert kept_bytes(config, 800, bf16, lora) == pytest.approx(expected, rel=0.03)


def test_memory_of_the_state() -> None:
    plan = choose(task(), DEVICES["h200"], 1)
    n = size("3.3b").num_parameters()
    assert plan.memory["weights"] == 4 * n and plan.memory["optimiser"] == 8 * n and plan.memory["EMA"] == 4 * n
    assert plan.needed == sum(plan.memory.values())
    sharded = choose(task(), DEVICES["h100-80"], 8)
    assert sharded.memory["weights"] == 4 * n / 8 and sharded.memory["gradients"] == 4 * n / 8
    adaptive = choose(task("300m", moments=4), DEVICES["h200"], 1)
    assert adaptive.memory["optimiser"] == 16 * size("300m").num_parameters()


@pytest.mark.parametrize(
    ("name", "gpu", "ranks", "nodes", "strategy"),
    [
        ("300m", "h100-80", 1, 1, "single"),
        ("300m", "rtx4090", 4, 1, "ddp"),
        ("3.3b", "h200", 8, 1, "ddp"),
        ("3.3b", "h100-80", 8, 1, "fsdp"),
        ("3.3b", "h100-80", 64, 8, "hybrid"),
        ("3.3b", "h100-80", 192, 24, "hybrid"),
        ("3.3b", "a100-40", 16, 2, "fsdp"),
    ],
)
def test_strategy(name: str, gpu: str, ranks: int, nodes: int, strategy: str) -> None:
    plan = choose(task(name), DEVICES[gpu], ranks, nodes=nodes)
    assert plan.fits and plan.strategy == strategy
    assert plan.micro * plan.accumulate * plan.ranks == 192
    assert plan.needed <= budget.USABLE * plan.device.memory
    bigger = [m for m in range(plan.micro + 1, 192 // ranks + 1) if (192 // ranks) % m == 0]
    if bigger:  # the next larger micro-batch would not fit
        memory = budget.memory_by_part(
            task(name),
            device=plan.device,
            shards=plan.shards,
            ranks=ranks,
            micro=bigger[0],
            accumulate=192 // ranks // bigger[0],
            checkpointing=plan.checkpointing,
        )
        assert sum(memory.values()) > budget.USABLE * plan.device.memory


def test_recomputing_only_where_nothing_else_helps() -> None:
    tight = choose(task("1.5b"), dataclasses.replace(DEVICES["h100-80"], memory=49e9), 1)
    assert tight.fits and tight.checkpointing != "none"
    memory = [
        choose(task("1.5b"), DEVICES["h200"], 1, checkpointing=kind, accumulate=192).needed
        for kind in ("none", "selective", "full")  # type: ignore[arg-type]
    ]
    assert memory == sorted(memory, reverse=True) and memory[0] > memory[2] + 1e9


def rtx4090s(capsys: pytest.CaptureFixture[str], *more: str, gpus: int = 8) -> tuple[str, float]:
    """The plan of 3.3b on them and its seconds per step."""
    forecast.main(["--size", "3.3b", "--gpus", str(gpus), "--gpu", "rtx4090", *more])
    out = capsys.readouterr().out
    found = re.search(r"time +([\d.]+) s per step", out)
    assert found is not None and all(len(line) < 240 for line in out.splitlines())
    return out, float(found[1])


def test_traffic_is_weighed_against_recomputing(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ("none", "selective", "full")
    each = {kind: rtx4090s(capsys, "--hardware.checkpointing", kind) for kind in kinds}
    chosen, seconds = rtx4090s(capsys)
    assert seconds == min(s for _, s in each.values()) == each["full"][1] < each["none"][1] / 5
    assert "checkpointing full: because fewer passes cost less traffic" in chosen and "recomputing included" in chosen
    assert "checkpointing full: asked for by hardware.checkpointing" in each["full"][0]
    said = each["none"][0]
    assert "which is the longer" in said and f"{seconds:.3g} s without --hardware.checkpointing none" in said
    assert "times as fast" in said


def test_recomputing_counts_in_time_not_in_flop() -> None:
    plans = [choose(task(), DEVICES["h200"], 8, checkpointing=kind) for kind in ("none", "full")]  # type: ignore[arg-type]
    assert plans[0].step_flop == plans[1].step_flop
    assert plans[1].compute_seconds(1e14) == pytest.approx(4 / 3 * plans[0].compute_seconds(1e14))
    adapter = choose(task(lora=AdapterConfig(rank=8)), DEVICES["h200"], 8, checkpointing="full")
    assert adapter.recompute_share == 1 / 2  # of two passes' FLOP
    tight = choose(task("1.5b"), dataclasses.replace(DEVICES["h100-80"], memory=49e9), 1)
    assert re.fullmatch(r"with(out it| less of it) [\d.]+ GiB would be needed", tight.why_recomputed)


def test_groups_share_the_network_of_their_node() -> None:
    # What leaves a node is the gradient of one copy, whoever holds it, once a step.
    slow = dataclasses.replace(DEVICES["rtx4090"], link=1e18, memory=1e15)
    for ranks, passes in ((8, 1), (16, 1), (8, 3)):
        ddp, hybrid = (
            choose(
                task("300m"), slow, ranks, nodes=ranks // 4, strategy=name, accumulate=passes
            ).communication_seconds()
            for name in ("ddp", "hybrid")  # type: ignore[arg-type]
        )
        assert hybrid == pytest.approx(ddp)


def test_what_a_ring_takes() -> None:
    n, h100 = size("3.3b").num_parameters(), DEVICES["h100-80"]

    def seconds(ranks: int, strategy: Any) -> tuple[float, float]:
        nodes = max(ranks // 8, 1)
        return choose(task(batch=ranks), h100, ranks, nodes=nodes, strategy=strategy).traffic_seconds()

    # Two gatherings in bf16 and a sum in float32 at the bus bandwidth: 74 ms, less the eighth that a rank has.
    assert seconds(8, "fsdp") == (pytest.approx(7 / 8 * 8 * n / 350e9, rel=0.03), 0)
    # Over more ranks the bytes stay, and the hops grow: three rings of each of 48 blocks.
    over = {ranks: seconds(ranks, "fsdp")[1] for ranks in (64, 192, 4096)}
    assert over[64] == pytest.approx(63 / 64 * 8 * n / 350e9 + 144 * (56 * budget.HOP + 7 * budget.FAR_HOP))
    assert over[64] < 1.3 * 8 * n / 350e9 < over[192] < 0.2 and over[4096] > 1
    # In groups of a node, weights and gradients take different ways at the same time, and neither grows much.
    for ranks in over:
        inside, between = seconds(ranks, "hybrid")
        assert inside == pytest.approx(seconds(8, "fsdp")[0])
        assert between == pytest.approx((1 - 8 / ranks) * 8 * n / 350e9)
    plan = choose(task(), h100, 192, nodes=24)
    assert plan.communication_seconds() == max(plan.traffic_seconds())
    # Groups that reach over nodes: both kinds take the network.
    wide = choose(task(), h100, 64, nodes=8, strategy="hybrid", shard_group=16).traffic_seconds()
    assert wide[0] == 0 and wide[1] > seconds(16, "fsdp")[1] + 0.7 * 4 * n / 350e9


def test_why_it_shards_is_told_with_figures() -> None:
    h100 = DEVICES["h100-80"]
    hybrid = choose(task(), h100, 64, nodes=8)
    over_all = choose(task(), h100, 64, nodes=8, strategy="fsdp")
    figures = (
        f"({hybrid.communication_seconds():.3g} s of traffic; over all ranks {over_all.communication_seconds():.3g} s)"
    )
    assert hybrid.why == f"weights travel inside groups of 8, between them only gradients {figures}"
    assert hybrid.communication_seconds() < over_all.communication_seconds()
    # Copies fit with recomputing, which takes longer; where they do not fit at all, that is said.
    assert choose(task(), h100, 8).why == (
        "a whole copy fits one GPU only with selective recomputing, which makes it 1.38 s per step instead of 1.31 s"
    )
    assert choose(task(), h100, 8, strategy="ddp").checkpointing == "selective"
    assert choose(task(), DEVICES["a100-40"], 8).why.endswith("do not fit one GPU")


def test_no_link_shortens_the_hops(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--size", "3.3b", "--gpus", "4096", "--gpu", "h100-80", "--batch.size", "4096"]
    forecast.main([*argv, "--hardware.strategy", "fsdp"])
    asked = capsys.readouterr().out
    assert "times as fast" not in asked and re.search(r"help: [\d.]+ s without --hardware.strategy fsdp", asked)
    plan = choose(task(batch=96), DEVICES["h100-80"], 96, nodes=12, strategy="fsdp")
    rate = 0.5 * 989e12
    faster = plan.links_needed(rate)
    assert faster is not None and faster > 1
    device = dataclasses.replace(plan.device, link=faster * plan.device.link, network=faster * plan.device.network)
    better = dataclasses.replace(plan, device=device)
    assert better.communication_seconds() == pytest.approx(better.compute_seconds(rate))


def test_adaptive_optimisers_are_not_sharded() -> None:
    for moments, gpus, strategy in ((2, 8, "fsdp"), (3, 8, "ddp"), (4, 8, "ddp")):
        assert choose(task(moments=moments), DEVICES["h100-80"], gpus).strategy == strategy


def test_what_fits_instead() -> None:
    gpu = DEVICES["rtx4090"]
    narrowed = forecast.what_fits(choose(task("1.5b"), gpu, 2, checkpointing="none", accumulate=1))
    assert narrowed.startswith("without --hardware.checkpointing none --batch.accumulate 1 it fits")
    assert forecast.what_fits(choose(task(), DEVICES["h100-80"], 1, checkpointing="none")).startswith(
        "without --hardware.checkpointing none it fits"
    )
    assert forecast.what_fits(choose(task("300m"), gpu, 1, accumulate=1)).startswith("--batch.accumulate ")
    assert "LORA=16" in forecast.what_fits(choose(task(), gpu, 1))
    assert "--optim.name adamw" in forecast.what_fits(choose(task(moments=4), gpu, 8))


def test_time_and_days() -> None:
    plan = choose(task("300m"), DEVICES["h200"], 1)
    assert plan.compute_seconds(0.4 * 989e12) == pytest.approx(1.75, rel=0.01)  # 192 clips at 40 % of the peak
    text = "\n".join(forecast.lines(plan, name="300m", rate=0.4 * 989e12, rate_said="an MFU of 40%"))
    assert "1,000,000 steps take 20.3 days, 20 GPU-days" in text and budget.FLOP_RULE in text
    eight = forecast.lines(choose(task("300m"), DEVICES["h200"], 8), name="300m", rate=0.4 * 989e12, rate_said="")
    assert "1,000,000 steps take 2.5 days, 20 GPU-days" in "\n".join(eight)


def test_the_share_of_the_peak_is_a_measured_one_unless_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert [devices.expected_mfu(width) for width in (64, 1024, 1536, 2000, 2048, 4096)] == [
        0.43,
        0.43,
        0.47,
        0.47,
        0.5,
        0.5,
    ]
    argv = ["--size", "1.5b", "--gpus", "8", "--gpu", "h100-80"]
    seconds = []
    for more, said in (
        ([], "an MFU of 47% (one H200's at the nearest width;"),
        (["--mfu", "0.235"], "an MFU of 24% (assumed;"),
    ):
        forecast.main([*argv, *more])
        out = capsys.readouterr().out
        assert said in out
        seconds += [float(number) for number in re.findall(r"time +([\d.]+) s per step", out)]
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=0.02)


def test_float32_is_reckoned_with_its_own_peak(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(d.peak_float32 and d.peak and d.peak_float32 <= d.peak for d in DEVICES.values())
    argv = ["--size", "1.5b", "--gpus", "8", "--gpu", "h100-80"]
    seconds = {}
    for precision, peak, said in (
        ("bf16", 989, "one H200's at the nearest width; of 989 TFLOP/s dense bf16"),
        ("float32", 67, "that of bf16, not measured in float32; of 67 TFLOP/s dense float32"),
    ):
        more = ["--hardware.precision", precision]
        forecast.main([*argv, *more])
        out = capsys.readouterr().out
        assert f"an MFU of 47% ({said})" in out
        seconds[precision] = float(re.findall(r"computing ([\d.]+) s", out)[0])
        config = read_config([*argv[:2], *more], folders=False)
        device = DEVICES["h100-80"]
        plan = choose(task("1.5b", bf16=precision == "bf16"), device, 8)
        assert next(line for line in start.plan_lines(config, plan) if line.startswith("time")) in out  # as a run does
        assert devices.peak_of(device, 8, bf16=precision == "bf16") == 8 * peak * 1e12
    assert seconds["float32"] == pytest.approx(989 / 67 * seconds["bf16"], rel=0.01)
    # So long a computing hides the traffic over all ranks, and the choice knows.
    choices = [choose(task(bf16=bf16), DEVICES["a100-40"], 64, nodes=8).strategy for bf16 in (True, False)]
    assert choices == ["hybrid", "fsdp"]


def test_without_a_peak_there_is_no_time() -> None:
    unknown = devices.Device("some GPU", 1e12, None)
    plan = choose(task("300m"), unknown, 1)
    rate, said = devices.rate_of(unknown, bf16=True, mfu=0.4)
    assert devices.peak_of(unknown, 1, bf16=True) is None
    assert forecast.lines(plan, name="300m", rate=rate, rate_said=said)[-1] == (
        "time      not known: no peak of some GPU in bf16 is known"
    )


def test_groups_that_no_strategy_has_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--size", "300m", "--gpu", "h100-80", "--hardware.shard_group", "4"]
    for gpus, more, said in (
        ("16", [], "4 is not used: only hybrid has groups, this is ddp; --hardware.strategy hybrid takes them"),
        ("16", ["--hardware.strategy", "fsdp"], "is not used: only hybrid has groups, this is fsdp; --hardware.str"),
        ("1", [], "4 is not used: only hybrid has groups, this is single\n"),
        ("16", ["--hardware.strategy", "hybrid"], ""),
    ):
        forecast.main([*argv, "--gpus", gpus, *more])
        out = capsys.readouterr().out
        assert said in out and ("hardware.shard_group" in out) == bool(said)


@pytest.mark.parametrize("gpus", ["0", "-1", "two"])
def test_make_train_names_gpus(gpus: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "-o", "setup", "train", f"GPUS={gpus}", f"BIN={tmp_path}"],
        cwd=Path(__file__).parents[2],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: GPUS={gpus}: give a whole number of at least 1, the GPUs (or processes) of")


def test_make_plan_takes_what_its_hint_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The hint "an adapter (LORA=16 with INIT=)" was dropped on the way."""
    command = ["make", "--no-print-directory", "-n", "-o", "setup", "plan", "SIZE=3.3b", "GPUS=1", "GPU=l40s"]
    done = subprocess.run(
        [*command, "LORA=16", "INIT=demo"],
        cwd=Path(__file__).parents[2],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(done.stdout)
    given = words[words.index("training.forecast") + 1 :]
    with pytest.raises(UserError, match="does not fit 1 x l40s"):
        forecast.main([*given[: given.index("--init")], "--batch.size", "16"])
    assert "an adapter (LORA=16 with INIT=)" in capsys.readouterr().out
    assert forecast.main([*given, "--batch.size", "16"]) == 0 and "adapter" in capsys.readouterr().out
    with pytest.raises(UserError, match="LORA=16 trains an adapter of a model: give it as INIT="):
        forecast.main(["--size", "300m", "--lora.rank", "16"])
    with pytest.raises(SystemExit):
        forecast.main(["--help"])
    assert "--per_node" in capsys.readouterr().out


@pytest.mark.parametrize("per_node", ["0", "1", "3", "6"])
def test_so_many_gpus_as_the_hint_says_fit_on_such_machines(per_node: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--size", "3.3b", "--gpu", "rtx4090", "--per_node", per_node]
    with pytest.raises(UserError, match="does not fit"):
        forecast.main([*given, "--gpus", "1"])
    hint = re.search(r"(\d+) GPUs of this kind", capsys.readouterr().out)
    assert hint is not None and forecast.main([*given, "--gpus", hint[1]]) == 0


def test_make_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert forecast.main(["--size", "3.3b", "--gpus", "64", "--gpu", "h100-80"]) == 0
    out = capsys.readouterr().out
    for words in ("3,256,956,928 parameters", "64 x h100-80 on 8 nodes", "strategy  hybrid over 8 ranks", "GPU-days"):
        assert words in out
    parts = re.search(r"memory +([\d.]+) GiB.*?: (.*)", out)
    assert parts is not None
    assert sum(float(n) for n in re.findall(r" ([\d.]+)(?:,|$)", parts[2])) == pytest.approx(float(parts[1]), rel=0.01)
    with pytest.raises(UserError, match="does not fit 1 x rtx4090"):
        forecast.main(["--size", "3.3b", "--gpus", "1", "--gpu", "rtx4090"])
    out = capsys.readouterr().out
    assert "no room" in out and "SIZE=300m" in out and "GPUs of this kind" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpus", "0"], "GPUS must be at least 1"),
        (["--gpu", "h1000"], "unknown GPU 'h1000'; allowed: h200, h100-80"),
        (
            ["--gpus", "7", "--size", "300m"],
            r"batch.size 192 must be a multiple of 7 processes; for instance 189 or 196",
        ),
        (["--gpus", "12"], "not a multiple of the 8 of a node"),
        (
            ["--gpus", "8", "--hardware.nodes", "2"],
            r"hardware.nodes is 2, and this plan is for 8 GPUs on each .* GPUS=…",
        ),
        (
            ["--gpus", "8", "--hardware.devices=1"],
            r"hardware.devices is 1, and this plan .* leave hardware.devices and",
        ),
        (["--size", "30b"], "unknown SIZE '30b'; allowed: demo, 300m"),
        (["--gpus", "8", "--hardware.strategy", "hybrid"], "allowed: 2, 4"),
        *(
            (
                ["--gpus", "8", "--hardware.strategy", strategy, "--hardware.shard_group", "4", "--optim.name", name],
                "the adaptive optimisers keep whole tensors; use ddp or --optim.name adamw",
            )
            for strategy, name in (("fsdp", "dadapt"), ("hybrid", "prodigy"))
        ),
    ],
)
def test_what_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        forecast.main(argv)


def test_states_are_written_beside_the_training_where_a_copy_has_room() -> None:
    config = read_config(["--size", "300m", "--hardware.accelerator", "cpu"], folders=False)
    plan = budget.choose(task_of(config), Device("cpu", 1e12, None), 1)
    copy = 4.0 * 4 * plan.task.trained  # weights, average and two moments
    for room, expected in ((1.001, True), (0.999, False)):
        memory = room * (plan.needed + copy) / budget.USABLE
        least = dataclasses.replace(plan, device=dataclasses.replace(plan.device, memory=memory))
        assert train._in_background(config, least) is expected
        for said in ("on", "off"):
            asked = dataclasses.replace(config, log=dataclasses.replace(config.log, state_background=said))  # type: ignore[arg-type]
            assert train._in_background(asked, least) is (said == "on")


def test_every_part_of_a_step_goes_round_the_rings_again() -> None:
    whole, parts = (choose(task(), DEVICES["h100-80"], 64, nodes=8, strategy="fsdp", accumulate=n) for n in (1, 3))
    assert parts.hop_seconds() == pytest.approx(3 * whole.hop_seconds()) and whole.hop_seconds() > 0
    assert parts.communication_seconds() == pytest.approx(3 * whole.communication_seconds())


def test_an_adapters_step_is_two_thirds_of_the_flop() -> None:
    adapter = task(lora=AdapterConfig(rank=16))
    assert adapter.clip_flop == pytest.approx(task().clip_flop * 2 / 3)


def test_the_memory_is_that_of_the_container_where_it_is_less_and_shared_by_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(devices, "Path", lambda _: limit)
    machine = devices.host_memory()  # no file
    for said, expected in ((str(2**20), 2**20), (str(2**63), machine), ("max", machine)):
        limit.write_text(said)
        assert devices.host_memory() == expected
    assert devices.device_here(4, False).memory == machine / 4
