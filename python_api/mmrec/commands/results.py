"""``mmrec results``: multimodal, identity-only and each modality alone over several seeds, with paired intervals; peers
beside them, if asked for.

One folder per model and seed, ``OUT/<model>/seed-<n>``. Finished ones are reused as long as data, split and config are
the same; an interrupted one goes on from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import print_rows, say, write_json
from .data import Data, load_data
from .evaluate import SHOWN, differences, figures, print_differences, with_metrics
from .kept import kept_result
from .rankers import evaluate_floor, floor_names
from .runs import Source, fit
from .settings import Choices, label, only

if TYPE_CHECKING:
    from ..evaluation import Interval, Result
    from ..recommender.config import RecommenderConfig
    from .peers import Peers

    Figures = Mapping[str, Mapping[str, Interval]]

__all__ = ["Study", "print_means", "results_command", "seeds_of", "variants"]

_FEWEST_SEEDS = 3
_GROUPS = ("warm", "cold-among-all", "cold-among-cold")


def results_command(
    *,
    data: Path,
    out: Path,
    protocol: str,
    seeds: str,
    choices: Choices,
    layout: str,
    split_seed: int,
    hold_out: float | None,
    peers: Sequence[str],
    json_file: Path | None,
) -> None:
    """See ``mmrec results --help``."""
    from .peers import Peers

    numbers = seeds_of(seeds)
    read = load_data(data, protocol, layout=layout, split_seed=split_seed, hold_out=hold_out)
    configs = variants(choices.config(read.catalogue, numbers[0]))
    beside = Peers(read, replace(choices, settings=()), peers) if peers else None
    source = Source(data.absolute(), layout, protocol, split_seed, hold_out)
    study = _run_all(read, configs, beside, numbers, out, source)
    study.print()
    content = study.to_dict()
    write_json(out / "results.json", content)
    _write(out / "results.md", study.markdown())
    study.write_report(out / "report.html")
    write_json(json_file, content)
    say(f"tables: {out / 'results.md'}   report: {out / 'report.html'}")


def variants(config: RecommenderConfig) -> list[RecommenderConfig]:
    """The configs of a study: ``config`` itself first, then identity-only, then each content modality alone."""
    alone = [("identity",), *((name,) for name in config.content)]
    return [only(config, names) for names in dict.fromkeys([config.modalities, *alone])]


@dataclass(frozen=True, eq=False)
class Study:
    """The finished runs. ``results`` has one result per seed for each model, the first model being the one in question,
    peers the last; ``floors`` are models without randomness."""

    data: Data
    seeds: Sequence[int]
    config: RecommenderConfig
    results: Mapping[str, Sequence[Result]]
    floors: Mapping[str, Result]

    @property
    def model(self) -> str:
        """The model that the others are compared with."""
        return next(iter(self.results))

    @cached_property
    def means(self) -> Figures:
        """Per model and metric, the mean over users and seeds with its interval."""
        return self._intervals("all")

    @cached_property
    def compared(self) -> Figures:
        """Per other model and metric, the paired interval of the model in question minus the other."""
        others: dict[str, Result | Sequence[Result]] = {**self.results, **self.floors}
        del others[self.model]
        return {name: differences(self.results[self.model], other, SHOWN) for name, other in others.items()}

    @cached_property
    def groups(self) -> Mapping[str, Figures]:
        """:attr:`means` for targets that training never saw, and for the others; empty where there are none of the
        first."""
        found = {group: self._intervals(group) for group in _GROUPS}
        return {group: figures for group, figures in found.items() if figures} if found[_GROUPS[1]] else {}

    @cached_property
    def compared_groups(self) -> Mapping[str, Figures]:
        """:attr:`compared` in each of the :attr:`groups`."""
        from ..evaluation import compare

        others: dict[str, Result | Sequence[Result]] = {**self.results, **self.floors}
        mine = others.pop(self.model)
        return {
            group: {name: {m: compare(mine, other, m, row=group) for m in SHOWN} for name, other in others.items()}
            for group in self.groups
        }

    def _intervals(self, group: str) -> Figures:
        from ..evaluation import interval

        every = {**self.results, **{name: [floor] for name, floor in self.floors.items()}}
        return {
            name: {metric: interval(entry, metric, row=group) for metric in SHOWN}
            for name, entry in every.items()
            if all(group in result.rows for result in entry)
        }

    def print(self) -> None:
        """The tables on the terminal."""
        first = self.results[self.model][0]
        title = f"{first.dataset} ({first.fingerprint[:12]}), protocol {first.protocol}, test, masked: {first.mask}"
        print_means("model", self.means, f"{title}; seeds {', '.join(map(str, self.seeds))}")
        print_differences(self.model, self.compared, SHOWN)
        for group, found in self.groups.items():
            print_means(group, found, f"{found[self.model][SHOWN[0]].users} users, {group}")
            print_differences(self.model, self.compared_groups[group], SHOWN)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        first = self.results[self.model][0]
        return {
            "command": "results",
            "model": self.model,
            "dataset": first.dataset,
            "fingerprint": first.fingerprint,
            "protocol": first.protocol,
            "split": first.split,
            "split_rule": self.data.split.origin,
            "mask": first.mask,
            "seed": list(self.seeds),
            "metrics": {metric: value.mean for metric, value in self.means[self.model].items()},
            "models": {name: figures(values) for name, values in self.means.items()},
            "differences": {name: figures(values) for name, values in self.compared.items()},
            "groups": _named(self.groups),
            "group_differences": _named(self.compared_groups),
            "runs": {name: [result.to_dict() for result in entry] for name, entry in self.results.items()},
        }

    def markdown(self) -> str:
        """The tables as Markdown, for documentation."""
        first = self.results[self.model][0]
        lines = [
            f"## {first.dataset}, protocol {first.protocol}",
            "",
            f"Fingerprint `{first.fingerprint[:12]}`, {self.data.split.origin}; all items ranked, masked: "
            f"{first.mask}; seeds {', '.join(map(str, self.seeds))}; {len(first.rows['all'].users)} users"
            f"{', titles masked' if self.config.mask_title else ''}. "
            "Mean [95 % bootstrap interval over users and seeds].",
            "",
            *_markdown_table("model", self.means, _bounds),
            "",
            f"Paired differences, {self.model} minus the other model (* the interval excludes 0):",
            "",
            *_markdown_table("minus", self.compared, _starred),
        ]
        for group, found in self.groups.items():
            lines += ["", f"{group}, {found[self.model][SHOWN[0]].users} users:", ""]
            lines += _markdown_table("model", found, _bounds)
            lines += ["", f"{group}, {self.model} minus the other model:", ""]
            lines += _markdown_table("minus", self.compared_groups[group], _starred)
        return "\n".join(lines) + "\n"

    def write_report(self, path: Path) -> None:
        """The study as one HTML page."""
        from ..evaluation import write_report
        from ..evaluation.report import group_rows, metric_rows

        first = {name: entry[0] for name, entry in self.results.items()}
        compared = [{"model": f"{self.model} − {name}", "values": dict(v)} for name, v in self.compared.items()]
        page = {
            "title": f"{self.data.catalogue.name}: what each modality brings",
            "subtitle": f"{len(self.seeds)} seeds per model; the groups are those of seed {self.seeds[0]}",
            "fingerprint": self.data.fingerprint[:12],
            "protocol": f"{self.data.split.protocol}: {self.data.split.origin}",
            "seeds": list(self.seeds),
            "metrics": metric_rows({**self.results, **self.floors}, SHOWN, floors=self.floors),
            "differences": compared,
            "slices": group_rows(first, SHOWN),
            "config": self.config.to_dict(),
        }
        write_report(page, path)


def _run_all(
    data: Data, configs: Sequence[RecommenderConfig], peers: Peers | None, seeds: Sequence[int], out: Path,
    source: Source,
) -> Study:  # fmt: skip
    """Trains what is not there yet, seed by seed, so that an interrupted study has whole seeds."""
    metrics = with_metrics(SHOWN)
    names = [] if peers is None else peers.names
    results: dict[str, list[Result]] = {name: [] for name in [*map(label, configs), *names]}
    for number, seed in enumerate(seeds, 1):
        for config in configs:
            name = label(config)
            say(f"seed {seed} ({number} of {len(seeds)}), {name}")
            folder = out / name / f"seed-{seed}"
            run = fit(data, config.replace(seed=seed), folder, source, resume=True, metrics=metrics)
            results[name].append(run.result)
        for name in names:
            assert peers is not None
            path = out / name / f"seed-{seed}" / "metrics.json"
            results[name].append(kept_result(path, peers.identity(name, seed), partial(_peer, peers, name, seed)))
    floors = {name: evaluate_floor(name, data, metrics=metrics) for name in floor_names(None)}
    return Study(data, seeds, configs[0], results, floors)


def _peer(peers: Peers, name: str, seed: int) -> Result:
    return peers.result(name, seed)[0]


def _named(groups: Mapping[str, Figures]) -> dict[str, Any]:
    return {group: {name: figures(values) for name, values in found.items()} for group, found in groups.items()}


def seeds_of(text: str, fewest: int = _FEWEST_SEEDS) -> list[int]:
    """``--seeds`` as numbers, at least so many."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds needs numbers such as 0,1,2, got {text!r}") from None
    if len(set(numbers)) != len(numbers) or len(numbers) < fewest or min(numbers) < 0:
        raise ValueError(f"--seeds needs at least {fewest} different seeds ≥ 0, got {text!r}")
    return numbers


def _starred(value: Interval) -> str:
    return f"{value}{' *' if value.excludes_zero else ''}"


def _bounds(value: Interval) -> str:
    return f"{value.mean:.4f} [{value.low:.4f}, {value.high:.4f}]"


def print_means(corner: str, rows: Figures, title: str) -> None:
    """A line per model with its mean and interval of each metric."""
    print_rows([corner, *SHOWN], [[name, *(_bounds(v[m]) for m in SHOWN)] for name, v in rows.items()], title=title)


def _markdown_table(corner: str, rows: Figures, show: Callable[[Interval], str]) -> list[str]:
    lines = [f"| {corner} | {' | '.join(SHOWN)} |", f"|---|{'---|' * len(SHOWN)}"]
    return lines + [f"| {name} | {' | '.join(show(values[m]) for m in SHOWN)} |" for name, values in rows.items()]


def _write(path: Path, text: str) -> None:
    from ..files import write_atomic

    write_atomic(path, text.encode())
