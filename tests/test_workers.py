"""Many workers on one study, in a real PostgreSQL and in a journal file; some are killed, one is put to sleep."""

import collections
import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from autoq import definition, leases, studies
from autoq.errors import SearchError
from autoq.search import PlanPoint, Unit, search
from autoq.search_values import pareto

WORKER = Path(__file__).with_name("search_worker.py")
_SPEC = importlib.util.spec_from_file_location("search_worker", WORKER)
synthetic = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(synthetic)
DEADLINE_S = 240  # after which a test that waits for other processes gives up; nothing else depends on it


def programs():
    """The folder of PostgreSQL's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        pytest.fail("PostgreSQL's server is needed: apt-get install postgresql, as .ci/run does.")
    return found[-1].parent if found else Path(on_path).parent


@pytest.fixture(scope="module")
def database():
    """The URL of a database in a cluster of its own, reached through a socket in a temporary folder."""
    with cluster() as (url, _):
        yield url


@contextlib.contextmanager
def cluster():
    """A running PostgreSQL: the URL of its first database, and what runs pg_ctl."""
    folder = Path(tempfile.mkdtemp(prefix="autoq-pg-"))
    # The server refuses to run as root.
    account = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    if account:
        shutil.chown(folder, "nobody", "nogroup")
    server = folder / "data"

    def run(program, *arguments):
        command = [str(programs() / program), "-D", str(server), *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **account)
        assert done.returncode == 0, done.stdout + done.stderr

    run("initdb", "-U", "autoq", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale", "C")
    options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off"

    def control(verb):
        run("pg_ctl", "-w", "-m", "immediate", "-l", str(folder / "log"), "-o", options, verb)

    control("start")
    try:
        yield f"postgresql+psycopg://autoq@/postgres?host={folder}", control
    finally:
        control("stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["postgresql", "journal"])
def storage(request, tmp_path):
    """An empty storage's URL."""
    if request.param == "journal":
        return f"journal:{tmp_path / 'study.journal'}"
    import sqlalchemy

    url = request.getfixturevalue("database")
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    name = f"test{time.monotonic_ns()}"
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return url.replace("/postgres?", f"/{name}?")


class Workers:
    """Processes on one storage, and what they wrote."""

    def __init__(self, storage, folder):
        self.storage = storage
        self.log = folder / "evaluations.jsonl"
        self.processes = []

    def start(self, *options):
        command = [sys.executable, str(WORKER), self.storage, str(self.log), *map(str, options)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.processes.append(process)
        return process

    def events(self, kind, process=None):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines]
        return [one for one in found if one["event"] == kind and (process is None or one["pid"] == process.pid)]

    def wait_for(self, condition):
        until = time.monotonic() + DEADLINE_S
        while not condition():
            for process in self.processes:
                assert process.poll() in (None, 0, -signal.SIGKILL), process.stdout.read()
            assert time.monotonic() < until, self.log.read_text() if self.log.exists() else "no worker began"
            time.sleep(0.05)

    def finish(self, process):
        """What a worker found; it must end by itself, well, and without a word."""
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, output) == (0, "")
        (done,) = self.events("done", process)
        return done

    def trials(self, done):
        with studies.told(self.storage):
            return optuna.load_study(study_name=done["study"], storage=studies.open_storage(self.storage)).get_trials()


@pytest.fixture
def workers(storage, tmp_path):
    made = Workers(storage, tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


def front_of_one_worker(plans):
    """The front of a worker that measures these plans one after the other, all of them in full."""
    problem = synthetic.PROBLEM
    points = [
        PlanPoint(
            assignment=plan,
            label="",
            source="local",
            predicted_loss=0.0,
            time_us=problem.time_us(plan),
            bytes=problem.bytes(plan),
            evaluation=synthetic.measured(plan),
            fidelity=1,
            full=True,
        )
        for plan in sorted(map(tuple, plans))
    ]
    within = [point for point in points if point.excess(synthetic.BUDGET) == 0]
    return [[list(point.assignment), point.evaluation.loss_delta] for point in pareto(within, "time")]


def check_front(done):
    """Over the limit a plan is not measured in full; within it the front is that of one worker."""
    limit = synthetic.BUDGET.max_loss
    within = [[plan, loss] for plan, loss in done["pareto"] if synthetic.measured(tuple(plan)).high <= limit]
    assert within == front_of_one_worker(done["points"])


def counted(events):
    return collections.Counter((tuple(one["plan"]), one["fidelity"]) for one in events)


@pytest.mark.parametrize("place", [None, "another machine"], ids=["same machine", "another machine"])
def test_a_killed_workers_plan_is_measured_by_another_and_nothing_twice(workers, place):
    patience = ["--patience", 3 if place else 10_000]  # on its own machine a dead process is known at once
    killed = workers.start("--hang-at", 3, *patience, *(["--place", place] if place else []))
    workers.wait_for(lambda: workers.events("end", killed))
    other = workers.start("--pause", 0.05, *patience)
    workers.wait_for(lambda: workers.events("hang") and workers.events("end", other))
    killed.send_signal(signal.SIGKILL)
    done = workers.finish(other)

    (hung,) = workers.events("hang")
    ended = counted(workers.events("end"))
    assert set(ended.values()) == {1}
    assert counted(workers.events("start")) - ended == {(tuple(hung["plan"]), hung["fidelity"]): 1}
    (again,) = [one for one in workers.events("end", other) if (one["plan"], one["fidelity"]) == _key(hung)]
    assert again["pid"] == other.pid
    assert sorted(map(tuple, done["points"])) == sorted({plan for plan, _ in ended})
    check_front(done)
    trials = workers.trials(done)
    lost = [one for one in trials if one.state == TrialState.FAIL and "evaluation:1" not in one.user_attrs]
    (lost,) = [one for one in lost if one.user_attrs["lease"]["owner"]["pid"] == killed.pid]
    # Parameters that Optuna draws may stand for a plan that is known by then; its trial costs nothing.
    again = [one.state for one in trials if _same_plan(one, lost) and not one.user_attrs["plan"]["repeated"]][1:]
    assert again in ([TrialState.COMPLETE], [TrialState.PRUNED])
    assert not [one for one in trials if one.state in (TrialState.RUNNING, TrialState.WAITING)]


def _key(event):
    return event["plan"], event["fidelity"]


def _same_plan(one, other):
    return one.user_attrs.get("plan", {}).get("hash") == other.user_attrs["plan"]["hash"]


def test_workers_that_start_together_share_the_plans(workers):
    processes = [workers.start("--pause", 0.2) for _ in range(3)]
    found = [workers.finish(process) for process in processes]
    ended = counted(workers.events("end"))
    assert set(ended.values()) == {1}
    assert counted(workers.events("start")) == ended
    assert sum(one["evaluations"] for one in found) == ended.total()
    assert all(one["evaluations"] > 0 for one in found)
    assert len({json.dumps([sorted(one["points"]), one["pareto"]]) for one in found}) == 1
    check_front(found[0])
    assert len(found[0]["points"]) <= synthetic.ARGUMENTS["n_trials"]


def test_a_worker_that_slept_too_long_loses_its_plan_and_goes_on(workers):
    asleep = workers.start("--hang-at", 3, "--patience", 2, "--place", "another machine")
    workers.wait_for(lambda: workers.events("hang"))
    asleep.send_signal(signal.SIGSTOP)
    held = (tuple(workers.events("hang")[0]["plan"]), workers.events("hang")[0]["fidelity"])
    other = workers.start("--patience", 2)
    workers.wait_for(lambda: held in counted(workers.events("end", other)))
    workers.log.with_suffix(".go").touch()
    asleep.send_signal(signal.SIGCONT)
    found = [workers.finish(process) for process in (asleep, other)]
    assert found[0]["points"] == found[1]["points"]
    check_front(found[0])
    ended = counted(workers.events("end"))
    assert ended.pop(held) == 2
    assert set(ended.values()) == {1}


def test_a_database_may_restart_while_a_plan_is_measured_and_is_named_when_it_stays_away(tmp_path):
    with cluster() as (url, control):
        workers = Workers(url, tmp_path)
        waiting = workers.start("--hang-at", 3)
        workers.wait_for(lambda: workers.events("hang"))
        control("restart")
        workers.log.with_suffix(".go").touch()
        workers.finish(waiting)

        def evaluate(schemes, fidelity):
            control("stop")
            return synthetic.measured(synthetic.PROBLEM.assignment(schemes), fidelity)

        with pytest.raises(SearchError, match=r"database must answer.*server"):
            search(synthetic.PROBLEM, evaluate=evaluate, storage=url, **synthetic.ARGUMENTS | {"fingerprint": "others"})
        control("start")


def test_a_plan_that_kills_whoever_measures_it_stops_the_others_too(tmp_path):
    storage = tmp_path / "study.journal"
    plans = []

    def deaths(count):
        (name,) = definition.published(studies.open_storage(storage))
        study = optuna.load_study(study_name=name, storage=studies.open_storage(storage))
        for number in range(count):
            attributes = {"plan": plans[0], "lease": {"owner": leases.owner(), "beat": number}}
            study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=attributes))

    def run(count):
        calls = itertools.count()

        def evaluate(schemes, fidelity):
            plans.append({"hash": "a plan's", "label": "limit 7", "assignment": []})
            if next(calls) == 0:
                deaths(count)
            return synthetic.measured(synthetic.PROBLEM.assignment(schemes), fidelity)

        return search(synthetic.PROBLEM, evaluate=evaluate, storage=storage, **synthetic.ARGUMENTS)

    with pytest.raises(SearchError, match="limit 7: a process that measures a plan lives to its end; got 5 that died"):
        run(5)
    found = run(4)  # the five are of before; four are bad luck
    assert found.points
    trials = optuna.load_study(study_name=found.study_name, storage=studies.open_storage(storage)).get_trials()
    assert [one.state for one in trials].count(TrialState.FAIL) == 9


def test_a_stopped_worker_hands_its_plan_back(workers):
    patience = ["--patience", 10_000, "--place"]  # nobody waits that long, nor knows the other's machine
    stopped = workers.start("--hang-at", 3, *patience, "a machine")
    workers.wait_for(lambda: workers.events("hang"))
    stopped.send_signal(signal.SIGINT)
    stopped.communicate(timeout=DEADLINE_S)
    done = workers.finish(workers.start(*patience, "another machine"))
    ended = counted(workers.events("end"))
    assert set(ended.values()) == {1}
    assert _key(workers.events("hang")[0]) in map(_key, workers.events("end"))
    check_front(done)


def test_a_resumed_search_waits_for_no_dead_process_and_ends_as_if_whole(workers, tmp_path):
    whole = search(
        synthetic.PROBLEM,
        evaluate=lambda schemes, fidelity: synthetic.measured(synthetic.PROBLEM.assignment(schemes), fidelity),
        storage=tmp_path / "whole.journal",
        **synthetic.ARGUMENTS,
    )
    killed = workers.start("--hang-at", 9, "--patience", 10_000)
    workers.wait_for(lambda: workers.events("hang"))
    killed.send_signal(signal.SIGKILL)  # and left a zombie
    done = workers.finish(workers.start("--patience", 10_000))
    assert [tuple(plan) for plan in done["points"]] == [point.assignment for point in whole.points]
    assert done["evaluations"] == whole.evaluations - 9


def test_a_journal_whose_writer_died_in_a_line_stays_readable_to_those_who_have_it_open(tmp_path):
    path = tmp_path / "study.journal"
    study = optuna.create_study(storage=studies.open_storage(path), study_name="a", directions=["minimize"] * 2)
    with path.open("ab") as stream:
        stream.write(b'{"op_code":2,"study_id":0,"user_at')
    study.set_user_attr("after", 1)
    assert optuna.load_study(study_name="a", storage=studies.open_storage(path)).user_attrs == {"after": 1}


def test_a_definition_reads_back_exactly_and_fits_any_databases_columns(storage):
    from dataclasses import replace

    unit = synthetic.PROBLEM.units[0]
    units = [Unit(name=f'"{n}"', layers=(f'"{n}".a', f'"{n}".b'), options=unit.options) for n in range(600)]
    units.append(replace(unit, name="alone", layers=("alone",)))
    problem = replace(synthetic.PROBLEM, units=tuple(units), fixed_time_us=0.1 + 0.2, fixed_bytes=7)
    made = definition.Definition(
        problem=problem,
        families={unit.name: "mlp" for unit in units},
        uniform={"none": problem.uniform("none"), "int8wo": problem.uniform("int8wo")},
        budget=synthetic.BUDGET,
        fidelities=3,
        seed=5,
        fingerprint="f",
        identity={"weights": "w"},
        recipe={"limit": None},
    )
    opened = studies.open_storage(storage)
    study = definition.publish(opened, "autoq", made, 9)
    again, read = definition.load(studies.open_storage(storage), study.study_name)
    assert read == made
    assert read.hash == made.hash
    assert again.user_attrs["n_trials"] == 9
    assert again.user_attrs["definition"]["chunks"] > 3
    assert max(len(json.dumps(value)) for value in again.user_attrs.values()) < 2**16
    assert list(definition.published(opened)) == [study.study_name]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql+psycopg://me:secret@127.0.0.1:9/autoq", ("reachable", "me:***@127.0.0.1:9/autoq")),
        ("nosuchdatabase://me:secret@host/autoq", ("database URL", "nosuchdatabase", "journal:PATH")),
        ("postgresql+nosuchdriver://me:secret@host/autoq", ("database URL", "autoq[postgres]")),
        ("nosuchdatabase://host/autoq?user=me&password=secret", ("database URL", "password=***")),
        ("redis://host:1", ("database URL", "redis")),
        ("postgresql+psycopg://host:port/autoq", ("database URL",)),
    ],
)
def test_a_storage_that_cannot_be_opened_is_refused_without_its_password(url, words):
    with pytest.raises(SearchError) as caught:
        studies.open_storage(url)
    assert all(word in str(caught.value) for word in words)
    assert "secret" not in str(caught.value)


def test_only_a_process_of_this_machine_is_known_to_be_gone():
    here = leases.owner()
    assert not leases.is_gone(here)
    assert leases.is_gone(here | {"started": here["started"] + 1})
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert leases.is_gone(here | {"pid": ended.pid})
    assert not leases.is_gone(here | {"pid": ended.pid, "place": "another machine"})
    assert not leases.is_gone(here | {"pid": ended.pid, "started": None})


TOY = """
import torch
from torch import nn

def make(seed=0, tokens=1):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))
    torch.manual_seed(tokens)
    return model, list(torch.randn(4, 8, 64))

def other_weights():
    return make(seed=5)

def other_inputs():
    return make(tokens=5)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The working folder, with a module that makes a model, and the times of one round."""
    from autoq.profiler import isolated

    monkeypatch.setattr(isolated, "_SECONDS_PER_SHAPE", 0.0)
    monkeypatch.setattr(isolated, "_MAX_COPIES", 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "autoq_toy", raising=False)
    (tmp_path / "autoq_toy.py").write_text(TOY)
    return tmp_path


def test_tune_publishes_what_a_worker_needs_and_strangers_are_refused(toy, storage, capsys):
    from autoq import candidates, cli, pipeline, results, tuning

    sys.path.insert(0, str(toy))
    try:
        import autoq_toy
    finally:
        sys.path.remove(str(toy))
    model, batches = autoq_toy.make()
    offered = ["int8wo", "int4mix(m_switch=8)"]
    result = pipeline.tune(
        model, batches, storage=storage, cache_dir=toy / "cache", max_increase=0.1, candidates=offered, n_trials=4
    )

    opened = studies.open_storage(storage)
    ((name, said),) = definition.published(opened).items()
    assert said["state"] == "done"
    assert said["identity"]["weights"] == result.plan.provenance["model"]["weights"]
    study, wanted = definition.load(opened, name)
    before = len(studies.finished(study))
    measured = {tuple(trial.user_attrs["plan"]["assignment"]) for trial in studies.finished(study)}
    every = itertools.product(*(range(len(unit.options)) for unit in wanted.problem.units))
    for assignment in [one for one in every if one not in measured][:2]:
        plan = {"assignment": assignment, "source": "local", "label": "left", "predicted_loss": 0.0, "repeated": False}
        plan["hash"] = studies.digest(wanted.problem.schemes(assignment))
        leases.queue(study, plan, {}, {})
    assert cli.run(["worker", "autoq_toy:make", "--storage", storage, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["study"] == name
    assert printed["plans"] == len(studies.finished(study)) >= before + 2
    assert printed["evaluations"] >= 2

    # What the worker measured, the tuning would have measured.
    tuned = tuning.Tuning(
        model,
        batches,
        None,
        results.Settings(candidates=tuple(map(candidates.parse, ["none", *offered]))),
        None,
    )
    tuned.prepare()
    assert tuned.scale.squares == wanted.recipe["squares"]
    judge = tuned.judge()
    assert judge.fingerprint == wanted.fingerprint
    for trial in studies.finished(study)[before:]:
        schemes = wanted.problem.schemes(tuple(trial.user_attrs["plan"]["assignment"]))
        assert trial.user_attrs["evaluation:0"] == judge.evaluate(schemes, 0).to_json()

    with pytest.raises(SearchError, match="reachable"):
        pipeline.tune(model, batches, storage="postgresql+psycopg://autoq@127.0.0.1:9/autoq", cache_dir=toy / "cache")
    for function, word in (("other_weights", "weights"), ("other_inputs", "tokens")):
        assert cli.run(["worker", f"autoq_toy:{function}", "--storage", storage, "--study", name]) == 1
        refused = capsys.readouterr().err
        assert f"the study's {word};" in refused
        assert said["identity"]["weights" if word == "weights" else "batches"] in refused
    assert cli.run(["worker", "autoq_toy:make", "--storage", storage, "--study", "another", "--wait", "0.1"]) == 1
    assert "has published" in capsys.readouterr().err


def blocks(language):
    page = (WORKER.parents[1] / "docs" / "workers.md").read_text()
    return [part.partition("```")[0] for part in page.split(f"```{language}\n")[1:]]


def test_the_pages_examples_are_valid(tmp_path):
    import shlex

    import yaml

    from autoq.cli import cli

    (job,) = map(yaml.safe_load, blocks("yaml"))
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    commands = [container["args"]]
    for script in blocks("sh"):
        path = tmp_path / "script.sh"
        path.write_text(script)
        subprocess.run(["bash", "-n", str(path)], check=True)
        commands += [shlex.split(line)[shlex.split(line).index("autoq") :] for line in _commands(script)]
    assert [command[1] for command in commands] == ["worker", "tune", "worker", "worker"]
    for _, verb, *arguments in commands:
        cli.commands[verb].make_context(verb, list(arguments))


def _commands(script):
    joined = script.replace("\\\n", " ").splitlines()
    return [line for line in joined if "autoq " in line and not line.startswith("#")]
