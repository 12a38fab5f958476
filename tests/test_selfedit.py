"""Prompts, the official splitter, the judges, the data files."""
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch

from data import knowledge
from checkpoint import UserError
from data import judges
from data.judges import yes_or_no
from lab.judges import judges as judges_main, released
from stats import agreement
from selfedit import PROMPTS, QUERY, read_self_edit, sample_self_edits, seed_for, split_documents


def test_prompts_to_the_letter():
    filled = {name: p.format(title="T", context="C") for name, p in PROMPTS.items()}
    assert list(filled) == ["implications", "implications-long", "implications-very-long", "rewrite", "self-qa", "none"]
    body = "the following passage and %s\n\nPassage:\nT\nC\n\n"
    produce = "produce a %s derived directly or indirectly from the content."
    for name, what in (("implications", "list of implications"), ("implications-long", "long list of implications"),
                       ("implications-very-long", "very long list of implications")):
        assert filled[name] == "Let's read " + body % (produce % what) + "Implications:\n"
    assert filled["rewrite"] == "Let's read " + body % "rewrite it in a few different ways, each one separated by a newline." + "Rewritten passages:\n"
    assert filled["self-qa"] == "Let's read " + body % "rewrite it in a question-answer format." + "Question 1: "
    assert filled["none"] == "Passage:\nT\nC\n\n"
    assert QUERY.format(title="T", question="Q?") == "Let's answer a question directly and concisely.\nQuestion: Topic: T\nQ?\nAnswer:\n"


@pytest.mark.parametrize("text, pieces", [
    ("", []), (" \n\n---\n ", []), ("one", ["one"]), ("one\n\n  two \n---\nthree---four", ["one", "two", "three", "four"]),
    ("Sure, here is a list:\n\n1. a\n2. b", ["1. a", "2. b"]), ("1. a\n2. b", ["1. a", "2. b"]), ("1. a\n1. b", ["1. b"]),
    ("Who?\nAnswer: Me\nQuestion 2: Why?\nAnswer: So\nit is.", ["Question 1: Who?\nAnswer: Me", "Question 2: Why?\nAnswer: So\nit is."]),
    ("Question 1: Who?\nAnswer: Me\n\nQuestion 2: Why?\nAnswer: So", ["Question 1: Who?\nAnswer: Me", "Question 2: Why?\nAnswer: So"]),
    ("Question 3: no reply\nat all", ["Question 3: no reply", "at all"]),
])
def test_splitter(text, pieces):
    assert split_documents(text) == pieces
    assert split_documents(text, limit=1) == pieces[:1]


@pytest.mark.parametrize("method, documents", [("base", 8.867), ("iter1", 8.350), ("iter2", 8.183), ("gpt4_1", 14.833)])
def test_splitter_on_the_released_edits(method, documents, shared_data):
    tasks = knowledge.load(shared_data / "squad_val_60.json")
    records = json.loads((shared_data / "squad_val_60.json").read_text())
    counts = [len(read_self_edit(t, r["released"][method]["edit"]).documents) for t, r in zip(tasks, records)]
    assert len(counts) == 60 and sum(counts) / 60 == pytest.approx(documents, abs=5e-4)


def test_documents_of_an_edit(passages):
    task = knowledge.load(passages)[0]
    passage = "Town 0\nThe river of town 0 is the Ob0. It was founded by Ana0 Reis."
    assert read_self_edit(task, " a\nb ").documents == ["Town 0\na", "Town 0\nb", passage] and task.context == [passage]
    assert read_self_edit(task, " \n ").documents == []
    assert len(knowledge.load(passages, max_documents=2)[0].read("a\nb\nc\nd")[0]) == 3
    assert task.prompt.endswith(f"Passage:\n{passage}\n\nImplications:\n") and task.questions == ["Which river?", "Who founded it?"]
    assert "Ob0" not in "".join(task.queries)  # asked without the passage


def test_sampled_edits_keep_their_ids_and_their_draws(tiny, tok, passages):
    tasks, seeds = knowledge.load(passages)[:2], [[seed_for(0, i, j) for j in range(2)] for i in range(2)]
    edits = sample_self_edits(tiny, tok, tasks, 2, seeds, max_new=40)
    flat = [e for row in edits for e in row]
    assert all(tok.decode(e.token_ids).strip() == e.text and 0 < len(e.token_ids) <= 40 for e in flat)
    assert len({tuple(e.token_ids) for e in flat}) == 4
    assert any(e.token_ids[-1] == 256 for e in flat) or all(len(e.token_ids) == 40 for e in flat)  # EOS, if sampled, stays
    assert sample_self_edits(tiny, tok, tasks[1:], 1, [[seeds[1][1]]], max_new=40)[0][0].token_ids == edits[1][1].token_ids


@pytest.mark.parametrize("gold, prediction, rule, substring", [
    ("Belgrade", "It was sent to Belgrade.", True, True), ("Belgrade", "belgrade", True, True), ("Belgrade", "Belgradeless", False, False),
    ("the Duke of York", "York's duke", False, False), ("Sava Kosanović", "Kosanović, Sava", True, False), ("1,000", "1000 people", True, True),
    ("one two three four five", "five four three two", True, False), ("one two three four", "one two three", False, False),
    ("Paris", "", False, False), ("Paris", "  \n", False, False), ("no no no", "no", False, False), ("a", "b", False, False)])
def test_judges(gold, prediction, rule, substring):
    assert judges.recall_judge("?", gold, prediction) == rule
    assert judges.substring_judge("?", gold, prediction) == substring


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible stub: right answers have an x; every third request is refused at first."""
    asked, refused = [], 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and self.headers["Authorization"] == "Bearer key" and body["temperature"] == 0
        text = body["messages"][0]["content"]
        if len(Endpoint.asked) % 3 == 2 and Endpoint.refused < 4:
            Endpoint.refused += 1
            return self.send_error(429)
        if "forbidden" in text:
            return self.send_error(401)
        Endpoint.asked.append(text)
        reply = "Yes." if "Given answer: x" in text else "No, yes and no." if "both" in text else "no"
        data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_openai_judge(tmp_path, monkeypatch):
    """Retries what time may mend, says what it may not, and pays for nothing twice."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
    monkeypatch.setattr(judges, "BACK_OFF", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        judges.openai_judge([("q", "g", "p")])
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    triples = [(f"q{i}?", "gold", ("x", "y", "both", " ")[i % 4]) for i in range(40)]
    judge = judges.SlowJudge(judges.openai_judge, tmp_path / "judge.jsonl")
    judge.prepare(triples)
    assert [judge(*t) for t in triples if t[2] != " "] == [t[2] == "x" for t in triples if t[2] != " "]
    assert len(Endpoint.asked) == 30 and Endpoint.refused == 4  # an empty answer is not asked about
    with (tmp_path / "judge.jsonl").open("a") as f:
        f.write('[["torn')
    again = judges.SlowJudge(lambda triples: pytest.fail("asked twice"), tmp_path / "judge.jsonl")
    again.prepare(triples)
    assert again("q0?", "gold", "x") and not again("q1?", "gold", "y")
    with pytest.raises(UserError, match="HTTP 401"):
        judge.prepare([("forbidden?", "g", "p")])
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="nothing is lost"):
        judge.prepare([("new?", "g", "p")])


def test_the_model_as_judge(tiny, tok):
    """Batched, it says what the next token's logits say one by one."""
    texts = [judges.GRADING.format(f"Question {i}", "gold " * i, "prediction") for i in range(7)]
    ids = {w: [tok.encode(form)[0] for form in (w, w.title(), " " + w, " " + w.title())] for w in ("yes", "no")}
    expected = []
    for text in texts:
        p = tiny(torch.tensor([tok.prompt(text)]))[0, -1].softmax(-1)
        expected.append(bool(p[ids["yes"]].sum() > p[ids["no"]].sum()))
    assert yes_or_no(tiny, tok, texts, at_once=3) == expected


def test_released_verdicts_are_the_released_figures(shared_data):
    """The accuracies that the authors' files state, and what adapters gain and lose, from the verdicts alone."""
    records = json.loads((shared_data / "squad_val_60.json").read_text())
    rows = released(records)
    for method, row in rows.items():
        stated = [float(r["released"][method]["adapter_accuracy"]) for r in records]
        assert row["accuracy"] == pytest.approx(stated, abs=1e-3)
    assert 0.05 < rows["naive"]["gained"] < rows["iter2"]["gained"] and rows["naive"]["lost"] < rows["iter2"]["lost"] < 0.5


def test_kappa_by_hand():
    assert agreement([1, 1, 0, 0], [1, 1, 0, 0]) == (1, 1)
    assert agreement([1, 1, 0, 0], [1, 0, 1, 0]) == (0.5, 0)
    observed, kappa = agreement([1] * 45 + [0] * 15 + [1] * 25 + [0] * 15, [1] * 60 + [0] * 40)  # a textbook case
    assert (observed, kappa) == (pytest.approx(0.6), pytest.approx(0.1304, abs=1e-4))


def test_calibration_on_the_released_verdicts(shared_data, capsys, monkeypatch):
    judges_main([str(shared_data / "squad_val_60.json")])
    line = capsys.readouterr().out.strip().splitlines()[-1].replace("|", "").split()
    assert line[0] == "all" and int(line[1]) == 2830
    rule_agrees, rule_kappa, substring_agrees = float(line[4]), float(line[5]), float(line[7])
    assert 0.85 <= rule_agrees <= 0.92 and rule_kappa > 0.7 and 0.84 <= substring_agrees <= 0.90


GOOD = {"title": "T", "context": "C", "questions": [{"question": "Q?", "answer": "A"}]}


@pytest.mark.parametrize("content, words", [
    ("", "not readable as JSON"), ("{}", "not a JSON list"), ("[]", "not a JSON list"), ([3], "record 0: not an object"),
    ([GOOD, GOOD | {"title": 5}], 'record 1: "title"'), ([GOOD | {"context": " "}], 'record 0: "context"'),
    ([{k: v for k, v in GOOD.items() if k != "questions"}], 'record 0: "questions"'),
    ([GOOD | {"questions": [{"question": "Q?"}]}], "record 0: question 0 must have"),
    ([GOOD | {"questions": [{"question": "Q?", "answer": 5}]}], "record 0: question 0 must have"),
    ([GOOD | {"questions": []}], "no passage has questions"),
])
def test_malformed_data_files_are_one_line(content, words, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=words) as error:
        knowledge.load(path, log=lambda line: None)
    assert "\n" not in str(error.value)


def test_a_passage_without_questions_is_skipped_and_said(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([GOOD | {"questions": []}, GOOD]))
    lines = []
    assert len(knowledge.load(tmp_path / "data.json", log=lines.append)) == 1
    assert len(lines) == 1 and "record 0" in lines[0] and "no questions" in lines[0]


@pytest.mark.parametrize("name", ["train", "eval"])
def test_example_passages_hold_their_answers(name):
    for task in knowledge.load(f"data/example_{name}.json"):
        assert all(judges.substring_judge("", a, task.context[0]) for a in task.answers[1:]) and len(task.questions) == 3
