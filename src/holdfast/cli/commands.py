"""The commands and their options; what they do lies elsewhere and is imported when they run."""

from __future__ import annotations

import json
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.cache import app as cache
from holdfast.cli.evaluate import compare, evaluate
from holdfast.cli.gate import gate
from holdfast.cli.mixer import app as mixer
from holdfast.cli.probes import app as probes
from holdfast.cli.rewind import rewind
from holdfast.cli.sweep import sweep
from holdfast.cli.watch import watch
from holdfast.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from holdfast.recipe import Recipe
    from holdfast.run import RunResult

app = typer.Typer(
    help="Fine-tune language models without losing what they already know.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
lab = typer.Typer(help="A tiny base model, and files to try things with.")
app.add_typer(lab, name="lab")
app.add_typer(cache, name="cache")
app.add_typer(mixer, name="mixer")
app.add_typer(probes, name="probes")
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("rewind")(rewind)
app.command("watch")(watch)
app.command("sweep")(sweep)
app.command("gate")(gate)

RecipeAndWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE.yaml|key=value",
        help="A recipe, and settings over it, such as train.epochs=2.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Fine-tune language models without losing what they already know."""
    if version:
        from importlib.metadata import version as version_of

        print(f"holdfast {version_of('holdfast')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def train(
    settings: RecipeAndWords = None,
    model: Annotated[str | None, typer.Option(help="The base: a folder or hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="The lesson: a file, folder or hub id.")] = None,
    out: Annotated[str | None, typer.Option(help="The run folder.")] = None,
    forget: Annotated[
        str | None,
        typer.Option(
            metavar="1%", help="How much may be forgotten: rise of the canary's loss, or 2pt."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the run folder.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show recipe, tokens, memory, steps; train nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train, measure what was forgotten, give a verdict.

    A recipe file is not needed where --model and --data are given. Exit codes: 0 passed, 3 the
    gate said FAIL, 4 the gate said INCONCLUSIVE, 2 the request was wrong, 1 something broke.
    """
    if resume and out is not None and not (model or data or _names_recipe(settings)):
        settings = [_recipe_of_run(out), *(settings or ())]
    budget = None if forget is None else {"forgetting": forget}
    recipe = _load(settings, model=model, data=data, out=out, budget=budget)
    if dry_run:
        _show_plan(recipe, as_json)
        return
    from holdfast.cli.preflight import preflight

    preflight(recipe, resume=resume)
    result = _run(recipe, resume, _console(as_json))
    _show_result(result, as_json)
    raise typer.Exit(result.exit_code)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented recipe to start from."""
    from holdfast.artifact import write_text
    from holdfast.cli.starter import starter

    if path.is_dir():
        raise RequestError(f"'{path}' is a folder; give a file, such as {path / 'recipe.yaml'}")
    if path.exists() and not force:
        raise RequestError(f"'{path}' exists already; give another path, or --force to overwrite")
    if not path.parent.is_dir():
        raise RequestError(f"folder '{path.parent}' does not exist; make it first")
    write_text(path, starter())
    print(f"wrote {path}; give model and data in it, then: holdfast validate {path}")


@app.command()
def validate(settings: RecipeAndWords = None, as_json: AsJson = False) -> None:
    """Check a recipe and every file that it names.

    All problems are named at once, a line each.
    """
    recipe = _load(settings)
    from holdfast.cli.preflight import preflight

    found = preflight(recipe)
    print(_json(found.as_dict()) if as_json else "\n".join([*found.lines(), "all is well"]))


@app.command("check-data")
def check_data(
    settings: RecipeAndWords = None,
    model: Annotated[str | None, typer.Option(help="The base: a folder or hub id.")] = None,
    data: Annotated[str | None, typer.Option(help="The lesson: a file, folder or hub id.")] = None,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Leave out what only the base can tell.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look at a lesson before training; change nothing.

    Finds repeated and unusable rows, skew, refusals, rows the base knows, and rows that are also
    in the canary or a probe. Without a model, what needs one is left out. Exit codes: 0 nothing
    is an error, 2 rows that training refuses.
    """
    with_model = not no_model and (model is not None or _names_model(settings))
    recipe = _load(settings, model=model if with_model else "none", data=data)
    from holdfast.cli.check import check_data as look

    found = look(recipe, _console(as_json), with_model=with_model)
    if as_json:
        print(_json(found.as_dict()))
    else:
        found.show(_console(False))
    raise typer.Exit(found.exit_code)


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from holdfast.recipe import Recipe

    print(_json(Recipe.model_json_schema()))


@app.command("show-batch")
def show_batch(
    settings: RecipeAndWords = None,
    step: Annotated[int, typer.Option(min=0, help="Which optimizer step, from 0.")] = 0,
    generate: Annotated[
        bool, typer.Option("--generate", help="Sample the self-generated rows, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the rows of one step, trained tokens bright."""
    recipe = _load(settings)
    from holdfast.cli.batches import as_records, print_rows, rows_of_step
    from holdfast.plan import BLANK, generated, sketch

    console = _console(as_json)
    with tempfile.TemporaryDirectory() as folder:
        prepared = (generated if generate else sketch)(recipe, Path(folder), console)
        rows = rows_of_step(prepared, step, blank="" if generate else BLANK)
    tokens = prepared.mixture.tokens_at(step)
    if as_json:
        print(_json({"step": step, "tokens": tokens, "rows": as_records(rows)}))
        return
    print_rows(rows, console)
    shares = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
    console.print(f"tokens of step {step}: {shares}", highlight=False, soft_wrap=True)
    if BLANK in tokens and not generate:
        console.print(f"{BLANK} rows are not written yet; --generate samples and shows them")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
) -> None:
    """Teach a tiny model a lesson without losing the rest."""
    from holdfast.demo import demo as run_demo

    raise typer.Exit(run_demo(out, _console(False)))


@app.command()
def theory(
    learnt: Annotated[
        float, typer.Option(help="Share of the lesson learnt, at which levers are compared.")
    ] = 0.84,
    draws: Annotated[int, typer.Option(min=1, help="Random pairs of tasks to compare on.")] = 50,
    dim: Annotated[int, typer.Option(min=1, max=256, help="Parameters of a random pair.")] = 16,
    overlap: Annotated[
        float, typer.Option(min=0, max=1, help="1: both losses of a pair are curved alike.")
    ] = 0.5,
    fisher_noise: Annotated[
        float, typer.Option(min=0, max=5, help="Error of EWC's Fisher, as a spread of its log.")
    ] = 1.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Predict what each lever forgets, from two quadratic losses.

    docs/theory.md says what the model is, and what it cannot know.
    """
    from holdfast.cli.theory import Draws, print_theory, theory_tables

    found = theory_tables(learnt, Draws(draws, dim, overlap, fisher_noise, seed))
    if as_json:
        print(_json(found))
    else:
        print_theory(found, _console(False))


@lab.command("pretrain")
def lab_pretrain(
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist yet.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1600,
    seed: Seed = 0,
) -> None:
    """Pretrain the lab's tiny base from scratch."""
    if out.exists():
        raise RequestError(f"--out: '{out}' exists already; give a folder that does not")
    from holdfast.lab.pretrain import pretrain

    console = _console(False)
    pretrain(out, steps=steps, seed=seed, progress=console.print)
    console.print(f"wrote {out}", highlight=False)


@lab.command("files")
def lab_files(
    folder: Annotated[Path, typer.Argument(help="Where to write them.")],
    lesson: Annotated[str, typer.Option(help="verbs, facts or extraction.")] = "verbs",
    seed: Seed = 0,
    counterexamples: Annotated[
        int, typer.Option(min=0, help="Rows of the verbs that their lesson does not apply to.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Write a lesson, probes, canary text and replay text for the lab's base."""
    from holdfast.lab import write_files
    from holdfast.lab.lessons import LESSONS

    if lesson not in LESSONS:
        raise RequestError(f"--lesson: '{lesson}' is none; {did_you_mean(lesson, LESSONS)}")
    if counterexamples and lesson != "verbs":
        raise RequestError("--counterexamples: only the lesson 'verbs' has some; leave it out")
    try:
        paths = write_files(folder, lesson=lesson, seed=seed, counterexamples=counterexamples)
    except ValueError as error:
        raise RequestError(f"--counterexamples: {error}; give fewer") from error
    except (FileExistsError, NotADirectoryError) as error:
        raise RequestError(f"'{folder}' is a file; give a folder") from error
    written = {name: str(path) for name, path in paths.items()}
    print(_json(written) if as_json else "\n".join(written.values()))


def _load(settings: list[str] | None, **options: Any) -> Recipe:
    """The recipe that a command line asks for: the first word, if it is a file, then the rest."""
    from holdfast.recipe import load_recipe

    words = list(settings or ())
    return load_recipe(words.pop(0) if _names_recipe(words) else None, words, **options)


def _names_model(settings: list[str] | None) -> bool:
    """Whether a recipe or a word says which model."""
    from holdfast.recipe import read_yaml

    words = list(settings or ())
    given = read_yaml(Path(words.pop(0))) if _names_recipe(words) else {}
    return "model" in given or any(word.startswith(("model=", "model.")) for word in words)


def _names_recipe(settings: list[str] | None) -> bool:
    return bool(settings and settings[0].endswith((".yaml", ".yml")))


def _recipe_of_run(out: str) -> str:
    from holdfast.artifact import RunFolder

    return str(RunFolder.open(Path(out)).recipe)


def _run(recipe: Recipe, resume: bool, console: Console) -> RunResult:
    from holdfast.run import train as run_train

    try:
        return run_train(recipe, resume=resume, console=console)
    except KeyboardInterrupt:
        if (Path(recipe.out) / "recipe.yaml").is_file():
            hint = f"continue it with: holdfast train --resume --out {shlex.quote(recipe.out)}"
        else:
            hint = "nothing was trained yet; start it again"
        typer.echo(f"holdfast: interrupted; {hint}", err=True)
        raise typer.Exit(130) from None


def _show_result(result: RunResult, as_json: bool) -> None:
    verdict = result.verdict
    if as_json:
        found = {
            "folder": str(result.folder),
            "seconds": round(result.seconds, 1),
            "summary": result.summary,
            "verdict": verdict.as_dict() if verdict else None,
        }
        print(_json(found))
        return
    console = _console(False)
    if verdict:
        console.print(verdict.table())
    told = {"kept": result.summary.get("kept")}
    told |= {"budget": result.summary.get("budget", {}).get("end")}
    told |= {"stopped early": result.summary.get("stopped")}
    for name, line in told.items():
        if line:
            console.print(f"{name}: {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {result.folder / 'report.html'}", highlight=False, soft_wrap=True)


def _show_plan(recipe: Recipe, as_json: bool) -> None:
    import yaml

    from holdfast.plan import plan

    console = _console(as_json)
    found = plan(recipe, console)
    settings = recipe.model_dump(mode="json")
    if as_json:
        print(_json({"recipe": settings, "plan": found.as_dict()}))
    else:
        print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        console.print(found.table())


def _console(as_json: bool) -> Console:
    """Where progress is shown; stderr where stdout is for JSON."""
    from rich.console import Console

    return Console(stderr=as_json)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
