"""What became of the steps of a run on a GPU, kept in files while it goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from report import markdown
from results import Run


@dataclass
class Outcome:
    """What became of one step: passed, failed, skipped or cut off."""

    step: str
    state: str
    seconds: float
    says: str

    def __str__(self) -> str:
        return f"{self.step:<12} {self.state:<8} {self.seconds:6.0f} s  {self.says}"


class Report:
    """What became of the steps, in `<slug>-checks.json` and `<slug>.md`: whole at any time."""

    def __init__(self, results: Path, slug: str, gpu: str) -> None:
        self.results, self.slug, self.gpu = results, slug, gpu
        self.checks = results / f"{slug}-checks.json"
        self.outcomes: dict[str, Outcome] = {}
        if self.checks.exists():  # steps of earlier commands
            known = json.loads(self.checks.read_text())["steps"]
            self.outcomes = {each["step"]: Outcome(**each) for each in known}

    def run(self, step: str, do: Callable[[], Outcome]) -> Outcome:
        self.note(Outcome(step, "cut off", 0.0, "has not come to its end"))
        outcome = do()
        self.note(outcome)
        print("\n" + self.summary(), flush=True)
        return outcome

    def note(self, outcome: Outcome) -> None:
        self.outcomes[outcome.step] = outcome
        steps = [asdict(each) for each in self.outcomes.values()]
        self.write(
            self.checks, json.dumps({"gpu": self.gpu, "date": time.strftime("%Y-%m-%d"), "steps": steps}, indent=1)
        )

    def summary(self) -> str:
        lines = [str(outcome) for outcome in self.outcomes.values()]
        measured = self.results / f"{self.slug}.json"
        if measured.exists():
            text = markdown(Run.read(measured))
            self.write(self.results / f"{self.slug}.md", text)
            lines += ["", text]
        return "\n".join(lines)

    def write(self, path: Path, text: str) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(text + "\n")
        part.replace(path)
