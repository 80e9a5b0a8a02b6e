"""Speed of generation, ours and that of transformers' `MusicgenForConditionalGeneration.generate`, in turn in one run.

    python -m benchmarks.generate [--size 300m] [--pairs 5] [--steps 24] [--json FILE]

One clip, guidance on, the same random weights and the same small codec in both, from the hidden states of a prompt to
the sound. Two comparisons: at equal precision (float32 on a CPU), and ours with int8 weights against transformers at
its best setting, which is sought first among its types and caches. The floor beside ours is the bytes that a step must
read at the bandwidth of plain reads, measured in turn with the steps. What smaller weights cost is measured on the demo
model: its loss on held-out tracks of the embedded catalogue and the divergence from float32, step by step as in
generation.
Keep the machine otherwise idle.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.models import TEXT_TOKENS, random_model
from musicgen import codec as codecs
from musicgen import generate, listen, patterns, settings
from musicgen.conditions import Conditions, stack
from musicgen.engine import Engine
from musicgen.lm import MusicLM
from musicgen.packing import PRECISIONS
from musicgen.sampler import Sampler
from musicgen.sampling import SamplingConfig
from musicgen.stream_decoder import decode_long
from musicgen.windows import Windows, stream_codes

CATALOGUE = Path(__file__).parent.parent / "musicgen" / "assets" / "catalogue"


@dataclass(frozen=True)
class BenchConfig:
    """What to measure.

    Args:
        size: 300m, 1.5b, 3.3b or demo.
        steps: columns of a clip.
        pairs: turns of ours and theirs.
        quality_clips: held-out tracks for the cost of smaller weights; 0 leaves it out.
        threads: threads of the CPU; 0 takes torch's own number.
        json: also write the result to this file.
    """

    size: str = "300m"
    steps: int = 24
    pairs: int = 5
    quality_clips: int = 6
    threads: int = 0
    json: str = ""


def their_model(lm: MusicLM, codec: codecs.Codec, dtype: torch.dtype) -> Any:
    """transformers' model with our weights, shared where the type is the same."""
    import transformers

    c = lm.config
    decoder = transformers.MusicgenDecoderConfig(
        vocab_size=c.codebook_size, hidden_size=c.dim, num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
        ffn_dim=c.ffn_mult * c.dim, num_codebooks=c.num_codebooks, dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, pad_token_id=c.special_id, bos_token_id=c.special_id, tie_word_embeddings=False,
    )  # fmt: skip
    text = transformers.T5Config(d_model=c.condition.text_dim, d_ff=64, num_layers=1, num_heads=4, vocab_size=64)
    whole = transformers.MusicgenConfig(
        text_encoder=text.to_dict(), audio_encoder=codec.model.config.to_dict(), decoder=decoder.to_dict()
    )
    with torch.device("meta"):
        model = transformers.MusicgenForConditionalGeneration(whole)
    model.audio_encoder = codec.model
    state = {}
    for key, value in lm.state_dict().items():
        if key.startswith("condition_provider"):
            name = "enc_to_dec_proj." + key.rsplit(".", 1)[1]
        else:
            name = "decoder." + _their_name(key)
        if key.endswith("in_proj_weight"):
            for letter, part in zip("qkv", value.chunk(3)):
                state[f"decoder.{_their_name(key.removesuffix('in_proj_weight'))}{letter}_proj.weight"] = part.to(dtype)
        elif name.split(".")[0] != "enc_to_dec_proj" or hasattr(model, "enc_to_dec_proj"):
            state[name] = value.to(dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.text_encoder.to_empty(device="cpu")
    inner = model.decoder.model.decoder  # its table of positions is computed, not stored
    inner.embed_positions = type(inner.embed_positions)(whole.decoder.max_position_embeddings, c.dim).to(dtype)
    model.generation_config.pad_token_id = model.generation_config.bos_token_id = c.special_id
    model.generation_config.decoder_start_token_id = c.special_id
    return model.eval()


def _their_name(key: str) -> str:
    for ours, theirs in (
        ("transformer.layers.", "model.decoder.layers."), ("emb.", "model.decoder.embed_tokens."),
        ("out_norm.", "model.decoder.layer_norm."), ("linears.", "lm_heads."), ("cross_attention.", "encoder_attn."),
        ("norm_cross.", "encoder_attn_layer_norm."), ("norm1.", "self_attn_layer_norm."),
        ("norm2.", "final_layer_norm."), ("linear1.", "fc1."), ("linear2.", "fc2."),
    ):  # fmt: skip
        key = key.replace(ours, theirs)
    return key


def ours(engine: Engine, codec: codecs.Codec, text: torch.Tensor, steps: int) -> None:
    """One clip of so many columns, from hidden states to sound."""
    frames = steps - engine.config.num_codebooks + 1
    prompted = Conditions(text, torch.ones(text.shape[:2], dtype=torch.bool))
    windows = Windows(frames, frames, frames - 1, codec.frame_rate, codec.sample_rate)
    scales = torch.full((1, frames), 3.0)
    branches = [prompted, prompted.without_text(engine.lm)]
    pieces = list(stream_codes(engine, branches, [0], SamplingConfig(), windows, scales=scales))
    decode_long(codec, torch.cat(pieces, dim=2))


def theirs(model: Any, text: torch.Tensor, steps: int, **options: Any) -> None:
    """The same clip by transformers' generate."""
    from transformers.modeling_outputs import BaseModelOutput

    hidden = BaseModelOutput(last_hidden_state=text.to(model.decoder.lm_heads[0].weight.dtype))
    mask = torch.ones(text.shape[:2], dtype=torch.long)
    model.generate(
        encoder_outputs=hidden, attention_mask=mask, do_sample=True, top_k=250, guidance_scale=3.0,
        max_new_tokens=steps, **options,
    )  # fmt: skip


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of each, measured in turn, after one run of each to warm up."""
    first(), second()
    times = [(_timed(first), _timed(second)) for _ in range(pairs)]
    return [a for a, _ in times], [b for _, b in times]


def steps_and_reads(engine: Engine, text: torch.Tensor, steps: int) -> dict[str, float]:
    """One guided clip stepped, and after each step a plain read of 512 MiB by all threads, so that both meet the same
    machine: ms of a step, ms that its bytes take at the read bandwidth beside it, their ratio; medians.
    """
    prompted = Conditions(text, torch.ones(text.shape[:2], dtype=torch.bool))
    branches = [prompted, prompted.without_text(engine.lm)]
    sampler = Sampler(
        engine, branches, [0], SamplingConfig(), steps, frame_rate=50, sample_rate_hz=32_000,
        scales=torch.full((1, steps), 3.0),
    )  # fmt: skip
    sampler.begin(torch.full((1, engine.config.num_codebooks, steps), -1))
    data, pairs = torch.ones(2**27), []
    for _ in range(steps - 1):
        step, read = _timed(sampler.advance), _timed(data.sum)
        pairs.append((step, engine.step_bytes(2, sampler.known, TEXT_TOKENS) * read / (4 * data.numel()), read))
    return {
        "step_ms": 1e3 * statistics.median(step for step, _, _ in pairs),
        "floor_ms": 1e3 * statistics.median(floor for _, floor, _ in pairs),
        "share_of_floor": statistics.median(floor / step for step, floor, _ in pairs),
        "read_gb_per_second": 4e-9 * data.numel() / statistics.median(read for _, _, read in pairs),
    }


# --- what smaller weights cost -----------------------------------------------------------------------------------


def held_out(count: int) -> list[tuple[str, torch.Tensor]]:
    """Description and codes `[1, K, T]` of 10 s of tracks of the embedded catalogue, none by an artist trained on."""
    from pipelines.assemble import SplitConfig, split_groups, split_of
    from pipelines.catalog import read

    codec = codecs.load("demo")
    rows = [row for row in read(str(CATALOGUE / "catalog.jsonl")).rows if not row.problems]
    groups = split_groups(rows)
    found = []
    for row in rows:
        path = CATALOGUE / row.values["uri"]
        if split_of(groups[str(row.track_id)], SplitConfig(0.85, 0.15, 0.0)) != "train" and path.is_file():
            sound = listen.read(str(path), codec.sample_rate, 1, what="track", max_seconds=10)
            tokens = torch.from_numpy(codec.encode_track(sound)).long()[None]
            found.append((row.values["descriptions"][0]["text"], tokens))
        if len(found) == count:
            break
    return found


@torch.no_grad()
def stepped_logits(engine: Engine, conditions: Conditions, columns: torch.Tensor) -> torch.Tensor:
    """Logits `[K, S, V]` of the prompted row of one guided clip, column by column as in generation."""
    both = stack([conditions, conditions.without_text(engine.lm)])
    cache = engine.start(both, columns.shape[-1])
    engine.listen(cache, both, None)
    steps = range(columns.shape[-1] - 1)
    return torch.stack([engine.feed(columns[..., s : s + 1].repeat(2, 1, 1), cache)[0] for s in steps], dim=1)


def quality(clips: int) -> dict[str, dict[str, float]]:
    """Per precision: loss on held-out tracks, divergence from float32 (nats per code), share of equal first choices."""
    model = generate.load("demo")
    lm, tracks = model.lm, held_out(clips)
    sums: dict[str, list[torch.Tensor]] = {precision: [] for precision in PRECISIONS}
    engines = {precision: Engine(lm, precision) for precision in PRECISIONS}  # type: ignore[arg-type]
    for text, tokens in tracks:
        columns, holds = patterns.interleave(tokens, lm.config.special_id, pattern=lm.config.pattern)
        conditions, targets, true = generate.encode_prompts(model, [text]), columns[0, :, 1:], None
        for precision, engine in engines.items():
            logits = stepped_logits(engine, conditions, columns)[holds[:, 1:]].log_softmax(-1)
            true = logits if true is None else true
            sums[precision].append(
                torch.stack(
                    [
                        F.nll_loss(logits, targets[holds[:, 1:]]),
                        F.kl_div(logits, true, log_target=True, reduction="batchmean"),
                        (logits.argmax(-1) == true.argmax(-1)).float().mean(),
                    ]
                )
            )
    means = {precision: torch.stack(rows).mean(dim=0).tolist() for precision, rows in sums.items()}
    names = ("held_out_loss", "divergence_nats", "same_first_choice")
    return {precision: dict(zip(names, values)) for precision, values in means.items()}


# --- the whole ---------------------------------------------------------------------------------------------------


def measure(bench: BenchConfig) -> dict[str, Any]:
    """All figures; see the file's story."""
    codec, lm = codecs.tiny(), random_model(bench.size)
    text = torch.randn(1, TEXT_TOKENS, lm.config.condition.text_dim)
    result: dict[str, Any] = {"ours": {}, "pairs": {}}
    dtypes = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}
    tried, peers = {}, {}
    for name, dtype in dtypes.items():
        peers[name] = their_model(lm, codec, dtype)
        for cache in (None, "static"):
            options = {"cache_implementation": cache} if cache else {}

            def run(model: Any = peers[name], options: dict[str, Any] = options) -> None:
                theirs(model, text, bench.steps, **options)

            codec.model.to(dtype)
            try:
                run()
                tried[f"{name}, {cache or 'growing'} cache"] = (_timed(run), run, dtype)
            except (RuntimeError, ValueError, TypeError) as error:
                print(f"transformers, {name}, {cache} cache: {str(error).splitlines()[0][:100]}")
            codec.model.to(torch.float32)
    result["transformers_seconds"] = {name: seconds for name, (seconds, _, _) in tried.items()}
    best = min(tried, key=lambda name: tried[name][0])
    result["transformers_best"] = best
    engines = {}
    for precision, peer in (("float32", "float32, growing cache"), (best.split(",")[0], best), ("int8", best)):
        engines[precision] = engine = Engine(lm, precision)  # type: ignore[arg-type]
        _, run_theirs, dtype = tried[peer]

        def run_peer(run: Callable[[], None] = run_theirs, dtype: torch.dtype = dtype) -> None:
            codec.model.to(dtype)
            run()
            codec.model.to(torch.float32)

        def run_ours(engine: Engine = engine) -> None:
            ours(engine, codec, text, bench.steps)

        mine, peers_times = in_turn(run_ours, run_peer, bench.pairs)
        ratios = [b / a for a, b in zip(mine, peers_times)]
        result["pairs"][f"{precision} against {peer}"] = {
            "ours_seconds": statistics.median(mine),
            "theirs_seconds": statistics.median(peers_times),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
    for precision in PRECISIONS:
        engine = engines.get(precision) or Engine(lm, precision)  # type: ignore[arg-type]
        result["ours"][precision] = steps_and_reads(engine, text, bench.steps)
    if bench.quality_clips:
        result["quality"] = quality(bench.quality_clips)
    return result


def table(bench: BenchConfig, result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"generation, size {bench.size}, one clip of {bench.steps} columns, guidance on, {torch.get_num_threads()} "
        "threads; floor: the bytes of a step at the bandwidth of plain reads in turn with the steps",
        "",
        f"  {'ours':<12}{'ms a step':>10}{'floor':>9}{'share':>8}{'reads GB/s':>12}",
    ]
    for name, row in result["ours"].items():
        lines.append(
            f"  {name:<12}{row['step_ms']:>10.1f}{row['floor_ms']:>9.1f}{row['share_of_floor']:>8.2f}"
            f"{row['read_gb_per_second']:>12.1f}"
        )
    lines += ["", f"  {'transformers':<26}{'s a clip':>10}"]
    lines += [f"  {name:<26}{seconds:>10.2f}" for name, seconds in result["transformers_seconds"].items()]
    lines.append("")
    for name, row in result["pairs"].items():
        lines.append(
            f"  {name}: {row['ours_seconds']:.2f} s and {row['theirs_seconds']:.2f} s, median ratio {row['ratio']:.2f} "
            f"of {len(row['ratios'])} pairs ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"
        )
    if "quality" in result:
        lines += ["", f"  {'demo model':<12}{'held-out loss':>14}{'divergence':>12}{'same choice':>13}"]
        for name, row in result["quality"].items():
            lines.append(
                f"  {name:<12}{row['held_out_loss']:>14.4f}{row['divergence_nats']:>12.5f}"
                f"{row['same_first_choice']:>13.1%}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Measure and print; see `BenchConfig`."""
    bench = settings.parse(BenchConfig, argv, prog="python -m benchmarks.generate")
    if bench.threads:
        torch.set_num_threads(bench.threads)
    result = measure(bench)
    print("\n" + table(bench, result))
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
    document = {**settings.to_dict(bench), "threads": torch.get_num_threads(), **versions, **result}
    print(json.dumps(document))
    if bench.json:
        Path(bench.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    settings.run(main)
