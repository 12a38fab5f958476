"""The exercises: the project's own functions pass, the stubs don't; each bug shows somewhere."""
import copy
import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import outer_loop
from engine.decode import Sampling
from exercises import bugs, tiny
from lora import PROJECTIONS, Adapters, Lora
from outer_loop import m_step
from selfedit import SelfEdit, sample_self_edits
from tests.helpers import ROOT, open_run, python, read_lines, run_rest_em

# Students' copies have no answers, and their stubs are filled in sooner or later.
if not (ROOT / "exercises" / "answers").exists():
    pytest.skip("this copy has no exercises/answers", allow_module_level=True)


def check(which, status):
    """What pytest says of exercises/check.py."""
    words = ("exercises/check.py", "-q", "--tb=line", "-rf", "-p", "no:cacheprovider")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        patch.setenv("EXERCISES", which)
        return python("-m", "pytest", *words, status=status).stdout


@pytest.mark.slow
def test_the_projects_own_functions_pass():
    assert "skipped" not in check("solutions", status=0)


@pytest.mark.slow
def test_every_test_of_the_stubs_fails_and_says_why():
    said = check("", status=1)
    failed = [line for line in said.splitlines() if line.startswith("FAILED")]
    assert len(failed) >= 40
    assert re.search(rf"^{len(failed)} failed in ", said, re.MULTILINE)   # none passed
    numbers = [re.search(r"::Test(\d\d)", line)[1] for line in failed]
    assert set(numbers) == {f"{number:02}" for number in range(1, 13)}
    for line, number in zip(failed, numbers):
        assert line.endswith(f"NotImplementedError: exercise {int(number)}")


def with_and_without(bug, measure):
    """What is measured without the bug and with it. Nothing raises."""
    right = measure()
    with bug():
        wrong = measure()
    assert measure() == right       # the patch is gone
    return right, wrong


def test_there_are_eight_and_each_is_explained():
    answers = (ROOT / "exercises" / "answers" / "bugs_answers.md").read_text()
    assert sorted(bugs.BUGS) == list(range(1, 9))
    for number, bug in bugs.BUGS.items():
        assert f"| {number} | `{bug.__name__}` |" in answers


@pytest.mark.slow
def test_bugs_of_the_inner_loop_show_in_losses_and_accuracy():
    def measure(bug):
        """(accuracy, mean first loss) of towns trained on their passage alone."""
        with bug():
            tasks = tiny.towns(4)
            outcomes = tiny.outcomes_of(tasks, ["It is a fine town to live in."] * 4)
        return tiny.accuracy(tasks, outcomes), sum(o.losses[0][0] for o in outcomes) / 4

    accuracy, loss = measure(nullcontext)
    pads_accuracy, pads_loss = measure(bugs.pads_learned)
    scale_accuracy, scale_loss = measure(bugs.wrong_scale)
    leaked_accuracy, _ = measure(bugs.question_leaked)

    # Learned pads start at a high loss and teach little.
    assert pads_loss > loss + 3
    assert pads_accuracy < accuracy - 0.1
    # A wrong scale begins at the same loss, as B is zero at first, and ruins the adapter.
    assert scale_loss == loss
    assert scale_accuracy < accuracy - 0.2
    # Leaked questions make empty notes perfect.
    assert accuracy < 0.65
    assert leaked_accuracy > 0.9
    assert measure(nullcontext) == (accuracy, loss)     # the patches are gone


def test_ties_by_position_keep_the_shortest_though_no_reward_differs():
    edits = [[SelfEdit("text", [1] * length, ["text"]) for length in (30, 50, 10, 20)]] * 5

    def kept_tokens():
        kept = outer_loop.select(tiny.CONFIG, [[0.5] * 4] * 5, edits, [0] * 5, t=0)
        return sum(len(edits[i][j].token_ids) for i, j in kept) / len(kept)

    assert with_and_without(bugs.ties_by_position, kept_tokens) == (40, 15)


def test_a_merge_in_bfloat16_is_not_what_was_trained():
    base, _ = tiny.load()
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))

    def gap():
        model = copy.deepcopy(base)
        adapters = Adapters(model, Lora(4, 4, PROJECTIONS), 1)
        adapters.flat.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
        with adapters.route([ids.numel()]):
            routed = model(ids)
        adapters.merge(0)
        return (model(ids) - routed).abs().max().item()

    right, wrong = with_and_without(bugs.merge_in_bfloat16, gap)
    assert right < 1e-3
    assert wrong > 1e-2


@pytest.mark.slow
def test_without_eos_the_policy_forgets_to_stop():
    base, tok = tiny.load()
    tasks = tiny.towns(24, "train")
    sampling = Sampling(160, n=1, temperature=0.8, top_p=0.95)
    written = dict(sample_self_edits(base, tok, tasks, sampling, [[i] for i in range(24)]))
    kept = [(tasks[i], written[i][0]) for i in range(24)]

    def surprise_at_eos():
        """Mean -log p(EOS) at the end of these self-edits, after an M-step on them."""
        model = copy.deepcopy(base)
        run = SimpleNamespace(tok=tok, log=lambda line: None, meter=lambda what: None)
        m_step(replace(tiny.CONFIG, outer_lr=1e-2), run, model,
               [(task, edit, 1.0) for task, edit in kept], 0)
        found = []
        for task, edit in kept[:8]:
            ids = torch.tensor(tok.prompt(task.prompt) + edit.token_ids)
            log_p = model(ids[None])[0, -2].log_softmax(-1)
            found.append(-log_p[tok.eos].item())
        return sum(found) / len(found)

    right, wrong = with_and_without(bugs.eos_missing, surprise_at_eos)
    assert wrong > right + 0.5


@pytest.mark.slow
def test_a_stale_policy_writes_the_same_after_the_m_step(tmp_path):
    def texts(folder):
        """What the held-out towns' self-edits are before and after one round, at temperature 0."""
        cfg = replace(tiny.CONFIG, iterations=1, tasks=8, edits=1, keep=1, eval_tasks=3,
                      eval_edits=1, baselines=False, temperature=0.0, outer_lr=1e-2,
                      inner_epochs=1, run_dir=str(tmp_path / folder))
        run = open_run(cfg)
        run_rest_em(run)
        return [[r["text"] for r in run.edits.of(t, "eval")] for t in (0, 1)]

    before, after = texts("right")
    assert before != after
    with bugs.stale_policy():
        before, after = texts("wrong")
    assert before == after


@pytest.mark.slow
def test_a_bug_can_be_run_by_its_number_and_an_unknown_one_is_a_line(tmp_path):
    small = ("--iterations 0 --eval-tasks 2 --eval-edits 1 --no-baselines --inner-epochs 1 "
             f"--device cpu --run-dir {tmp_path / 'run'}")
    python("-m", "exercises.bugs", "3", *small.split())
    (metrics,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert metrics["eval_unadapted"] > 0.2      # 3 is the hacked judge
    unknown = python("-m", "exercises.bugs", "9", status=1)
    assert unknown.stderr == "which bug? 1 to 8, then the flags of outer_loop.py\n"
