"""The page of an experiment: one HTML file that opens offline."""

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, cast

from gmel import __version__
from gmel.evaluation.statistics import Interval
from gmel.scenario.files import replace_file
from gmel.synthesis.curves import curve
from gmel.synthesis.data.sheet import contact_sheet
from gmel.synthesis.evaluate import BASE, OF_CNN, Experiment, table
from gmel.synthesis.figures import Rows, curves_figure, gains_figure
from gmel.synthesis.gate import Evidence
from gmel.synthesis.lesson import notices
from gmel.synthesis.photo import GOOD, Photo

__all__ = ["WORDS", "headline", "lines", "photos_jpeg", "write_report"]

WORDS = {
    "auroc": "AUROC",
    "tpr": "TPR at 5 % false alarms",
    "type_accuracy": "type accuracy",
    "balanced_accuracy": "balanced accuracy",
}
_CNN_WORDS = (
    " Rows with CNN: a small network trained from scratch on the same photos; the others read texture features."
    " The gate chooses for the texture features."
)
_SURE_DRAWS = 10
"""Draws below which no gain is claimed."""
_SURE_SHARE = 0.8
"""Share of draws that have to agree on the sign of a gain."""


def headline(found: Experiment) -> str:
    """What the experiment shows, in honest words: gains and losses of the gate that the draws resolve.

    A gain is claimed with ten draws or more, a 95 % interval above zero, and the same sign in four of five draws.
    """
    rows = table(found)
    draws, shots = len(found["draws"]), found["settings"]["shots"]
    said = _resolved(rows["gate"], draws)
    start = f"With {shots} photos a class and the gate on, against real photos with classic augmentation: "
    if draws < _SURE_DRAWS:
        return start + f"{draws} draws are too few to claim anything ({_SURE_DRAWS} are needed)."
    if not said:
        return (
            start
            + "no difference that these draws resolve. Classic augmentation is enough here."
            + _network(rows, draws)
        )
    return start + "; ".join(said) + "." + _network(rows, draws)


def _resolved(row: Mapping[str, Mapping[str, Interval | float]], draws: int) -> list[str]:
    """Gains and losses of a recipe that the draws resolve, in words."""
    said: list[str] = []
    for sign, word, agreeing in ((1, "more", "ahead"), (-1, "less", "behind")):
        for metric, cell in row.items():
            gain, agree = cast("Interval", cell["gain"]), cast("float", cell[agreeing])
            limit = gain.low if sign > 0 else -gain.high
            if draws >= _SURE_DRAWS and limit > 0.0 and agree >= _SURE_SHARE:
                said.append(f"{100 * abs(gain.mean):.1f} points {word} {WORDS[metric]}")
    return said


def _network(rows: Rows, draws: int) -> str:
    """How the CNN stands beside the texture features on the same photos; nothing where there is none."""
    if BASE + OF_CNN not in rows:
        return ""
    said = _resolved(rows[BASE + OF_CNN], draws)
    return f" A CNN in place of the texture features: {'; '.join(said) or 'no difference that these draws resolve'}."


def lines(found: Experiment) -> list[str]:
    """The table as text, a line for each recipe."""
    rows = table(found)
    metrics = [metric for metric in WORDS if metric in rows[BASE]]
    width = max(len(name) for name in rows)
    out = [f"{'':{width}}  " + "  ".join(f"{WORDS[metric]:>26}" for metric in metrics)]
    for name, row in rows.items():
        cells: list[str] = []
        for metric in metrics:
            value, gain = cast("Interval", row[metric]["value"]), cast("Interval", row[metric]["gain"])
            difference = "" if name == BASE else f" ({_points(gain)})"
            cells.append(f"{100 * value.mean:5.1f}{difference:>21}")
        out.append(f"{name:{width}}  " + "  ".join(cells))
    return [*out, "In %, mean over draws; in brackets points above real + classic, with the 95 % interval, paired."]


def write_report(path: Path, found: Experiment, sheets: Mapping[str, bytes]) -> None:
    """Writes the page.

    Args:
        path: the HTML file.
        found: the experiment.
        sheets: contact sheets to show as JPEG, by what made the photos; may be empty.
    """
    replace_file(path, _page(found, sheets).encode())


def _page(found: Experiment, sheets: Mapping[str, bytes]) -> str:
    style = (resources.files("gmel.evaluation") / "report.css").read_text(encoding="utf-8")
    settings, photos = found["settings"], found["photos"]
    facts = [
        f"{settings['shots']} photos a defect class",
        f"{len(found['draws'])} draws",
        f"{photos['test']} photos to test on",
        f"{photos['good']} good parts to learn from" if photos["good"] else "no good parts",
        f"{found['seconds']:.0f} s",
    ]
    noted = "".join(
        f'<p class="notice" role="note"><b>Note</b> {escape(notice)}</p>'
        for notice in notices(found["refused"], found.get("left_out", {}))
    )
    pictures = "".join(
        f'<figure><img alt="{escape(name)}: examples by class" style="max-width:100%" '
        f'src="data:image/jpeg;base64,{base64.b64encode(shown).decode()}"><figcaption>{escape(_caption(name))}</figcaption></figure>'
        for name, shown in sheets.items()
    )
    rows = table(found)
    metrics = {metric: title for metric, title in WORDS.items() if metric in rows[BASE]}
    gains = gains_figure({name: row for name, row in rows.items() if name != BASE}, metrics)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(found["dataset"])}: what synthesis is worth</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="kicker">GMEL synthesis</p>
<h1>{escape(found["dataset"])}</h1>
<ul class="facts">{"".join(f"<li>{escape(fact)}</li>" for fact in facts)}</ul>
</header>
<main>
<p class="headline">{escape(headline(found))}</p>
{noted}
<section><h2>Results</h2>{_results(rows)}
<p class="small">Mean over draws in %, below it the difference from real + classic in points with the 95 % interval,
paired by draw. Every detector is trained on the same real photos and tested on the same others, which nothing here has
learned from.{_CNN_WORDS if BASE + OF_CNN in rows else ""}</p></section>
<section><h2>Differences from real photos with classic augmentation</h2>
<figure>{gains}<figcaption>Points of each metric, 95 % intervals over draws. Left of the line is
harm.</figcaption></figure></section>
<section><h2>What the gate chose</h2>{_gate(found)}</section>
{_curves(found, metrics)}
{_fidelity(found)}
{f'<section><h2>Photos</h2><div class="figures">{pictures}</div></section>' if pictures else ""}
</main>
<footer>Made by gmel {escape(__version__)}. All numbers lie in <code>experiment.json</code> beside this file.</footer>
</body>
</html>
"""


def _results(rows: Rows) -> str:
    metrics = [metric for metric in WORDS if metric in rows[BASE]]
    head = "".join(f'<th scope="col" class="number">{WORDS[metric]}</th>' for metric in metrics)
    body = ""
    for name, row in rows.items():
        cells = ""
        for metric in metrics:
            value, gain = cast("Interval", row[metric]["value"]), cast("Interval", row[metric]["gain"])
            under = "" if name == BASE else f'<br><span style="color:var(--soft)">{_points(gain)}</span>'
            cells += f'<td class="number">{100 * value.mean:.1f}{under}</td>'
        kind = ' class="best"' if name == "gate" else ""
        body += f'<tr{kind}><th scope="row">{escape(name)}</th>{cells}</tr>'
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _points(gain: Interval) -> str:
    if math.isnan(gain.low):
        return f"{100 * gain.mean:+.1f}"
    return f"{100 * gain.mean:+.1f} ± {100 * (gain.high - gain.mean):.1f}"


def _gate(found: Experiment) -> str:
    """How often each choice was made, by part and class."""
    head = "<th>Part</th><th>Class</th><th>Chosen (draws)</th>"
    body = ""
    for part in ("detection", "typing"):
        if not any(draw["gate"]["evidence"].get(part) for draw in found["draws"]):
            continue
        for label in sorted(found["draws"][0]["gate"][part]):
            counts = Counter(_choice(draw["gate"][part][label]) for draw in found["draws"])
            words = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
            body += f"<tr><td>{part}</td><td>{escape(label)}</td><td>{escape(words)}</td></tr>"
    if not body:
        return "<p>There was nothing to choose.</p>"
    chosen = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return chosen + _evidence(found)


def _evidence(found: Experiment) -> str:
    """Why: what the held-out shots said of each candidate, over the draws."""
    body = ""
    for part in ("detection", "typing"):
        said: dict[str, list[dict[str, Any]]] = {}
        for draw in found["draws"]:
            for evidence in draw["gate"]["evidence"].get(part, ()):
                said.setdefault(evidence["candidate"], []).append(evidence)
        for candidate, rows in said.items():
            gain = sum(row["gain"] for row in rows) / len(rows)
            held = sum(Evidence(**row).holds for row in rows)
            body += (
                f'<tr><td>{part}</td><td>{escape(_candidate(candidate))}</td><td class="number">{gain:+.3f}</td>'
                f'<td class="number">{held} of {len(rows)}</td></tr>'
            )
    head = '<th>Part</th><th>Candidate</th><th class="number">Gain</th><th class="number">Believed in draws</th>'
    return f"""<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p class="small">Gain over classic augmentation on shots that were held out, in nats, mean over draws. It is believed
where it exceeds 1.64 of its standard errors; where nothing is, classic augmentation is used.</p>"""


def _candidate(name: str) -> str:
    """A share as the other table has it: "compose 0.05" is "compose 5 %"."""
    mode, _, share = name.rpartition(" ")
    return f"{mode} {100 * float(share):.0f} %" if share.replace(".", "", 1).isdigit() else name


def _curves(found: Experiment, metrics: Mapping[str, str]) -> str:
    """Utility by samples for each shot, and by denoising steps where a mode has them."""
    if not all("curves" in draw for draw in found["draws"]):
        return ""
    figures = ""
    for axis, words in (("samples", "samples for each shot"), ("steps", "denoising steps")):
        gains = {
            mode: {metric: curve(found["draws"], mode, axis, metric, BASE) for metric in metrics}
            for mode, axes in found["draws"][0]["curves"].items()
            if axes[axis]
        }
        if gains:
            figures += f"<figure>{curves_figure(gains, metrics, words)}<figcaption>By {words}.</figcaption></figure>"
    if not figures:
        return ""
    return f"""<section><h2>How many samples, how many steps</h2><div class="figures">{figures}</div>
<p class="small">Points above real + classic with 95 % intervals over draws, paired. The weight of the samples within a
class stays the same whatever their number.</p></section>"""


def _choice(choice: dict[str, Any]) -> str:
    return f"{choice['mode']} {100 * choice['share']:.0f} %" if choice["share"] else str(choice["mode"])


def _fidelity(found: Experiment) -> str:
    if not found["fidelity"]:
        return ""
    names = ("KID", "floor", "precision", "recall", "density", "coverage", "novelty", "copies")
    body = ""
    for mode, classes in found["fidelity"].items():
        for label, facts in classes.items():
            near = facts["neighbourhood"]
            values = [
                facts["kid"],
                facts["floor"],
                *(near[name] for name in names[2:6]),
                facts["novelty"],
                facts["copies"],
            ]
            cells = "".join(f'<td class="number">{_number(value)}</td>' for value in values)
            body += f"<tr><td>{escape(mode)}</td><td>{escape(label)}</td>{cells}</tr>"
    head = "".join(f'<th class="number">{name}</th>' for name in names)
    return f"""<section><h2>How like real photos</h2><div class="scroll"><table>
<thead><tr><th>Mode</th><th>Class</th>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p class="small">First draw, on texture features, beside the real photos of the test. KID of a perfect generator would
be near the floor, that of one half of the real photos against the other. Novelty is the distance to the nearest shot
over the distance between shots; below 0.5 a sample counts as a copy.</p></section>"""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _caption(name: str) -> str:
    if name == "shots":
        return "The shots of the first draw."
    shams = f"A row named {GOOD} shows shams: pieces of good parts blended onto good parts, labelled good."
    return f"Made by {name} from the shots of the first draw. {shams}"


def photos_jpeg(photos: Sequence[Photo]) -> bytes:
    """A contact sheet of photos by class, as JPEG, small enough for the page."""
    rows: dict[str, list[Photo]] = {}
    for photo in photos:
        rows.setdefault(photo.label, []).append(photo)
    data = io.BytesIO()
    contact_sheet(rows, columns=5, side=112).save(data, "JPEG", quality=82)
    return data.getvalue()
