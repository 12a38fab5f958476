"""The lecture's ten slides, made of the project's figures: one page that needs nothing else.

    python docs/slides.py [FILE]        # default: docs/slides.html

Turn the pages with the arrow keys; printed, each is a sheet of its own. Every number is looked up
in the page of results that it is from: if that page says something else now, this says so.
"""
import json
import re
import sys
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

DOCS = Path(__file__).resolve().parent


def figure(name):
    """An SVG of the project, to be put into the page."""
    svg = (DOCS / name).read_text()
    svg = svg[svg.index("<svg"):]       # no XML declaration: HTML knows none
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|\s+", " ", svg, flags=re.DOTALL)
    # Several figures name their parts alike, so each gets a prefix of its own.
    prefix = Path(name).stem
    return Markup(re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg))


def number(value, label, page="RESULTS.md"):
    """A measured value and what it is of."""
    if value not in (DOCS / page).read_text():
        sys.exit(f"docs/{page} does not say {value!r} any more: correct docs/slides.py")
    return value, label


def printed_by(cell_id):
    """What a cell of the notebook printed."""
    for cell in json.loads((DOCS / "nanoseal.ipynb").read_text())["cells"]:
        if cell["id"] == cell_id:
            return "".join(cell["outputs"][0]["text"])


def slides():
    """Of each slide: its title, a text, and numbers, a figure or something printed."""
    return [
        dict(title="A model that writes its own homework",
             text="A language model learns from notes that it writes: SEAL, arXiv 2506.10943.",
             numbers=[number("The hill of Halmora is Corcairn.", "before RL", "../README.md"),
                      number("The hill Corcairn looks down on Halmora.", "after two rounds",
                             "../README.md")]),
        dict(title="Two loops", figure=figure("loops.svg"),
             text="Notes train an adapter, and its answers are their reward. "
                  "The best notes are kept, and the model learns to write such notes."),
        dict(title="The reversal curse", printed=printed_by("curse"),
             text="Who learns that A is B can seldom say what B is. "
                  "So good notes state each fact in both directions."),
        dict(title="Towns: it learns to turn facts round", figure=figure("../data/tiny.svg"),
             text="Five seeds, 95 % intervals.",
             numbers=[number("0.54", "after the passage alone"),
                      number("0.60 ±0.03", "after its own notes"),
                      number("0.81 ±0.02", "after two rounds of RL"),
                      number("0.58 ±0.08", "control: random notes are kept")]),
        dict(title="Puzzles: it learns to choose settings", figure=figure("../data/tiny-arc.svg"),
             text="Five seeds, 95 % intervals.",
             numbers=[number("0.11 ±0.07", "puzzles solved before RL"),
                      number("0.29 ±0.06", "after two rounds"),
                      number("0.05 ±0.02", "control")]),
        dict(title="A real model: RL works with one seed of two",
             text="SmolLM2-135M, 60 passages, RL minus control. The passage alone has 0.42.",
             numbers=[number("-0.036 [-0.077, +0.004]", "if self-edits are its own texts"),
                      number("+0.13 [+0.06, +0.21]", "if they choose how to study, 1 of 2 seeds")]),
        dict(title="Hundreds of adapters, one frozen model", figure=figure("ribbon.svg"),
             text="Tokens of all adapters lie end to end, without padding. Beside PEFT:",
             numbers=[number("2.0 x", "two CPU cores"),
                      number("67 to 87 x", "one H200")]),
        dict(title="Is it only more compute?", figure=figure("lab/compute.svg"),
             text="Untrained notes catch up when there are many.",
             numbers=[number("0.586 ±0.035", "one untrained self-edit", "LAB.md"),
                      number("0.781 ±0.062", "one after RL", "LAB.md"),
                      number("k = 9.3 [3.6, 23.8]", "where they cross", "LAB.md")]),
        dict(title="Which line taught which answer?", figure=figure("lab/credit.svg"),
             text="Learn random halves of the notes, and regress the answers on their lines.",
             numbers=[number("0.997 ±0.005", "AUC, trained writer", "LAB.md")]),
        dict(title="Does what is learned survive?", figure=figure("lab/forgetting.svg"),
             text="Accuracy on all of 32 towns at the end:",
             numbers=[number("0.003 ±0.005", "merged as in the paper", "LAB.md"),
                      number("0.216 ±0.046", "half, two layers, rehearsal", "LAB.md")]),
    ]


PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>nanoSEAL: the slides</title>
<style>
@page { size: 1280px 720px; margin: 0 }
:root { color-scheme: light }
body { margin: 0; font: 2.1vw/1.4 system-ui, sans-serif; color: #1d2126; background: #fff }
section { width: 100vw; height: 100vh; box-sizing: border-box; padding: 4vh 5vw; overflow: hidden;
  display: flex; flex-direction: column; break-after: page; position: relative }
h1 { font-size: 3.6vw; line-height: 1.2; margin: 0 0 2vh; color: #2f6db3 }
main { flex: 1; min-height: 0; display: flex; gap: 4vw; align-items: center }
main > svg, pre { flex: 5; min-width: 0 }
main > svg { height: 100% }
div { flex: 3 }
div:only-child { font-size: 2.8vw }
b { display: block; font-size: 1.25em; line-height: 1.2; margin-top: 2vh }
pre { font-size: 1.5vw; background: #f1f3f5; padding: 2vh 2vw; white-space: pre-wrap }
footer { position: absolute; right: 3vw; bottom: 2vh; font-size: 1.3vw; color: #707070 }
</style>
{% for slide in slides %}
<section>
<h1>{{ slide.title }}</h1>
<main>
{{ slide.figure }}
{% if slide.printed %}<pre>{{ slide.printed }}</pre>{% endif %}
<div><p>{{ slide.text }}</p>
{% for value, label in slide.numbers %}
<b>{{ value }}</b>{{ label }}
{% endfor %}
</div>
</main>
<footer>{{ loop.index }}</footer>
</section>
{% endfor %}
<script>
addEventListener("keydown", event => {
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  scrollTo(0, (Math.round(scrollY / innerHeight) + step) * innerHeight);
});
</script>
</html>
"""


def main():
    target = Path(sys.argv[1] if sys.argv[1:] else DOCS / "slides.html")
    target.write_text(Environment(autoescape=True).from_string(PAGE).render(slides=slides()))


if __name__ == "__main__":
    main()
